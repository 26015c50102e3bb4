use std::{os::fd::BorrowedFd, thread};

use super::*;
use crate::region::Layout;

fn region() -> Region {
    Region::create("kv-test", Layout { block_bytes: 64, blocks: 8 }).unwrap()
}

fn descriptor(region: &Region) -> KvDescriptor {
    KvDescriptor {
        region: region.key(),
        blocks: vec![BlockRef { block: 7, generation: u64::MAX }, BlockRef { block: 0, generation: 3 }],
        tokens: 21,
        lease: LeaseId(5),
        lease_remaining: Duration::from_micros(1_500_001),
    }
}

fn message(region: &Region) -> Vec<u8> {
    let body = encode(&descriptor(region)).unwrap();
    let mut message = b"FBKX\x01\0\0\0".to_vec();
    message.extend((body.len() as u32).to_le_bytes());
    message.extend(body);
    message
}

/// Sends raw bytes with any number of descriptors, as a hostile peer may, and gives what the receiver makes of it.
fn received(bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Received, ExchangeError> {
    let (here, there) = UnixStream::pair().unwrap();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent =
        rustix::net::sendmsg(&here, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
    drop(here);
    recv_region(&there)
}

#[test]
fn a_region_and_its_descriptor_arrive() {
    let (here, there) = UnixStream::pair().unwrap();
    let region = region();
    region.set_generation(7, 11);
    for _twice_on_one_socket in 0..2 {
        send_region(&here, &region, &descriptor(&region)).unwrap();
        let got = recv_region(&there).unwrap();
        assert_eq!(got.descriptor, descriptor(&region));
        assert_eq!((got.region.key(), got.region.generation(7)), (region.key(), 11));
        assert!(!got.region.is_writable());
    }
    drop(here);
    assert!(matches!(recv_region(&there), Err(ExchangeError::Closed)));
}

#[test]
fn a_descriptor_larger_than_the_socket_buffer_arrives() {
    let (here, there) = UnixStream::pair().unwrap();
    let region = region();
    let blocks = vec![BlockRef { block: 1, generation: 2 }; DESCRIPTOR_BLOCKS_MAX];
    let descriptor = KvDescriptor { blocks, ..descriptor(&region) };
    let sender = thread::spawn({
        let descriptor = descriptor.clone();
        move || send_region(&here, &region, &descriptor)
    });
    assert_eq!(recv_region(&there).unwrap().descriptor, descriptor);
    sender.join().unwrap().unwrap();
}

#[test]
fn wrong_descriptors_are_not_sent() {
    let (here, _there) = UnixStream::pair().unwrap();
    let (region, other) = (region(), region());
    let send = |descriptor| send_region(&here, &region, &descriptor).unwrap_err();
    assert!(matches!(send(descriptor(&other)), ExchangeError::OtherRegion { .. }));
    let mut range = descriptor(&region);
    range.blocks[1].block = 8;
    assert!(matches!(send(range), ExchangeError::Range { block: 8, blocks: 8 }));
    let mut long = descriptor(&region);
    long.blocks = vec![long.blocks[0]; DESCRIPTOR_BLOCKS_MAX + 1];
    assert!(matches!(send(long), ExchangeError::Length { .. }));
}

#[test]
fn hostile_messages_are_refused() {
    let region = region();
    let good = message(&region);
    let fd = region.fd();
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let check = |what: &str, bytes: &[u8], fds: &[BorrowedFd<'_>], expected: fn(&ExchangeError) -> bool| {
        let error = received(bytes, fds).expect_err(what);
        assert!(expected(&error), "{what}: {error:?}");
    };
    assert_eq!(received(&good, &[fd]).unwrap().descriptor, descriptor(&region), "the message itself is good");
    check("another protocol", b"GET / HTTP/1.1\r\n\r\n", &[], |e| matches!(e, ExchangeError::NotExchange));
    check("a later version", &changed(4, 2), &[fd], |e| matches!(e, ExchangeError::Version { found: 2, .. }));
    check("no descriptor", &good, &[], |e| matches!(e, ExchangeError::FileDescriptors { found: 0 }));
    check("two", &good, &[fd, fd], |e| matches!(e, ExchangeError::FileDescriptors { found: 2 }));
    check("eight", &good, &[fd; 8], |e| matches!(e, ExchangeError::FileDescriptors { .. }));
    check("half a header", &good[..5], &[fd], |e| matches!(e, ExchangeError::Socket(_)));
    check("half a body", &good[..40], &[fd], |e| matches!(e, ExchangeError::Socket(_)));
    check("an endless body", &changed(11, 255), &[fd], |e| matches!(e, ExchangeError::Length { .. }));
    check("a body of half a block", &changed(8, 41), &[fd], |e| matches!(e, ExchangeError::Length { .. }));
    check("another count", &changed(12 + 36, 1), &[fd], |e| matches!(e, ExchangeError::Length { .. }));
    check("another pool", &changed(12, !good[12]), &[fd], |e| matches!(e, ExchangeError::OtherRegion { .. }));
    check("a block beyond", &changed(12 + 40 + 8, 8), &[fd], |e| matches!(e, ExchangeError::Range { .. }));
    let (socket, _peer) = UnixStream::pair().unwrap();
    check("a descriptor of something else", &good, &[socket.as_fd()], |e| {
        matches!(e, ExchangeError::Region(RegionError::NotSealed))
    });
}
