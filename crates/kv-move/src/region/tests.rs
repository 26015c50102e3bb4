use std::io::Write as _;

use proptest::prelude::*;

use super::*;

const LAYOUT: Layout = Layout { block_bytes: 4096 + 8, blocks: 5 };

fn region() -> Region {
    Region::create("kv-test", LAYOUT).unwrap()
}

fn duplicate(region: &Region) -> OwnedFd {
    region.fd().try_clone_to_owned().unwrap()
}

/// A memfd with these bytes, sealed or not.
fn memfd(bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

const SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A whole, valid region file of `LAYOUT` as bytes.
fn file() -> Vec<u8> {
    let geometry = Geometry::of(LAYOUT).unwrap();
    let mut bytes = vec![0; geometry.total_bytes];
    let header = Header { key: RegionKey { epoch: 1, id: 2 }, layout: LAYOUT }.encode(geometry);
    bytes[..header.len()].copy_from_slice(&header);
    bytes
}

#[test]
fn a_second_mapping_sees_what_the_first_writes() {
    let owner = region();
    let reader = Region::open(duplicate(&owner)).unwrap();
    assert_eq!((reader.key(), reader.layout()), (owner.key(), LAYOUT));
    assert!(owner.is_writable() && !reader.is_writable());
    let bytes: Vec<u8> = (0..LAYOUT.block_bytes).map(|i| i as u8).collect();
    owner.set_generation(4, 9);
    owner.copy_in(4, &bytes);
    owner.publish_checksum(4);
    let mut seen = vec![0; bytes.len()];
    reader.copy_out(4, &mut seen);
    assert_eq!(seen, bytes);
    assert_eq!((reader.generation(4), reader.generation_after_reads(4)), (9, 9));
    assert_eq!(reader.published_checksum(4), Some(reader.compute_checksum(4, 9)));
    drop(owner);
    reader.copy_out(4, &mut seen);
    assert_eq!(seen, bytes, "the mapping does not depend on the owner's");
}

#[test]
fn blocks_lie_one_after_the_other_from_a_page_boundary() {
    let region = region();
    let first = region.block_ptr(0).addr().get();
    assert_eq!(first % 4096, 0);
    for block in 0..LAYOUT.blocks {
        let address = region.block_ptr(block).addr().get();
        assert_eq!(address - first, block as usize * LAYOUT.block_bytes as usize);
    }
}

#[test]
fn a_new_generation_forgets_the_checksum() {
    let region = region();
    region.publish_checksum(1);
    assert!(region.published_checksum(1).is_some());
    region.set_generation(1, 1);
    assert_eq!(region.published_checksum(1), None);
}

#[test]
fn keys_differ() {
    let (a, b) = (region().key(), region().key());
    assert_eq!(a.epoch, b.epoch);
    assert_ne!(a, b);
}

#[test]
fn a_receiver_can_neither_resize_nor_map_for_writing() {
    let fd = duplicate(&region());
    assert_eq!(rustix::fs::ftruncate(&fd, 1), Err(rustix::io::Errno::PERM));
    assert_eq!(rustix::io::pwrite(&fd, b"x", 0), Err(rustix::io::Errno::PERM));
    assert_eq!(Mapping::new(&fd, 4096, Access::ReadWrite).err(), Some(rustix::io::Errno::PERM));
    assert_eq!(rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE), Err(rustix::io::Errno::PERM));
}

#[test]
#[should_panic(expected = "opened for reading")]
fn an_opened_region_refuses_to_be_written() {
    Region::open(duplicate(&region())).unwrap().set_generation(0, 1);
}

#[test]
#[should_panic(expected = "not in a region of 5 blocks")]
fn a_block_out_of_range_is_caught() {
    region().generation(5);
}

#[test]
fn impossible_layouts_are_refused() {
    let refused = |block_bytes, blocks| match Region::create("kv-test", Layout { block_bytes, blocks }) {
        Err(RegionError::Layout(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(8, 0), LayoutError::NoBlocks);
    assert_eq!(refused(0, 1), LayoutError::BlockBytes { block_bytes: 0 });
    assert_eq!(refused(12, 1), LayoutError::BlockBytes { block_bytes: 12 });
    let block_bytes = u64::MAX - 7;
    assert_eq!(refused(block_bytes, 3), LayoutError::TooLarge { blocks: 3, block_bytes });
}

#[test]
fn hostile_descriptors_are_refused() {
    fn check(what: &str, fd: OwnedFd, expected: fn(&RegionError) -> bool) {
        let error = Region::open(fd).expect_err(what);
        assert!(expected(&error), "{what}: {error:?}");
    }
    let changed = |at: usize, to: &[u8]| {
        let mut bytes = file();
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    assert_eq!(Region::open(memfd(&file(), SIZE)).unwrap().layout(), LAYOUT, "the file itself is good");

    let regular = std::fs::File::open("/proc/self/exe").unwrap();
    check("a regular file", regular.into(), |e| matches!(e, RegionError::NotSealed));
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    check("a socket", socket.into(), |e| matches!(e, RegionError::NotSealed));
    check("an unsealed file", memfd(&file(), SealFlags::empty()), |e| matches!(e, RegionError::NotSealed));
    check("one that may shrink", memfd(&file(), SealFlags::GROW), |e| matches!(e, RegionError::NotSealed));
    check("an empty file", memfd(&[], SIZE), |e| matches!(e, RegionError::NotRegion));
    check("half a header", memfd(&file()[..40], SIZE), |e| matches!(e, RegionError::NotRegion));
    check("another magic", memfd(&changed(0, b"X"), SIZE), |e| matches!(e, RegionError::NotRegion));
    check("another payload offset", memfd(&changed(40, &[1]), SIZE), |e| matches!(e, RegionError::NotRegion));
    check("a later version", memfd(&changed(8, &[2]), SIZE), |e| {
        matches!(e, RegionError::Version { found: 2, .. })
    });
    check("a truncated payload", memfd(&file()[..file().len() - 1], SIZE), |e| {
        matches!(e, RegionError::Size { .. })
    });
    let mut longer = file();
    longer.push(0);
    check("a longer file", memfd(&longer, SIZE), |e| matches!(e, RegionError::Size { .. }));
    check("blocks that overflow", memfd(&changed(16, &[0xF8; 8]), SIZE), |e| {
        matches!(e, RegionError::Layout(_))
    });
    check("no blocks", memfd(&changed(12, &[0; 4]), SIZE), |e| matches!(e, RegionError::Layout(_)));
}

proptest! {
    /// Whatever a peer writes into a sealed memfd, opening gives an error or a region that can be read to its end.
    #[test]
    fn no_bytes_make_open_panic(
        patches in prop::collection::vec((0..64usize, any::<u8>()), 0..6),
        cut in prop_oneof![Just(usize::MAX), 0..40_000usize],
    ) {
        let mut bytes = file();
        for (at, byte) in patches {
            bytes[at] = byte;
        }
        bytes.truncate(cut);
        if let Ok(region) = Region::open(memfd(&bytes, SIZE)) {
            for block in 0..region.layout().blocks {
                region.generation(block);
                region.compute_checksum(block, 0);
            }
        }
    }
}
