//! A client's socket: set up, and closed so that the client reads its answer.

use std::{
    future::{Pending, pending},
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Timeout, timeout},
};

use crate::http::limits::HttpLimits;

/// How long, and for how many bytes, what a client goes on sending is read after its answer. nginx takes 5 s at a time.
const LINGER_MAX: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 32 * 1024 * 1024;

/// A socket that is closed without losing the answer.
///
/// A request that is refused before it was read to its end (413, 431, 414, 400) leaves bytes in the socket. The kernel
/// answers bytes that nobody reads with a reset, and a client that is told of a reset while it sends may never look at
/// the answer. So once the answer is out and its end said, what still comes is read and thrown away for a while.
pub(super) struct Socket {
    stream: TcpStream,
    linger: Option<Linger>,
}

struct Linger {
    read: usize,
    end: Pin<Box<Timeout<Pending<()>>>>,
}

/// What every accepted socket needs. Without `TCP_NODELAY` the kernel holds a token's small write back until the client
/// acknowledged the one before, up to 40 ms.
pub(super) fn tune(stream: &TcpStream, limits: &HttpLimits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let millis = u32::try_from(limits.write_stall_timeout.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    }
    Ok(())
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, linger: None }
    }

    /// Reads away what comes, until nothing does or a bound is met.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = [0; 8 * 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                // Nothing is in doubt: the client said nothing more.
                Poll::Pending if self.linger.is_none() => return Poll::Ready(()),
                Poll::Pending => break,
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(()),
            }
            let begun = || Linger { read: 0, end: Box::pin(timeout(LINGER_MAX, pending())) };
            let linger = self.linger.get_or_insert_with(begun);
            linger.read += buffer.filled().len();
            if linger.read > LINGER_BYTES_MAX {
                return Poll::Ready(());
            }
        }
        match &mut self.linger {
            Some(linger) => linger.end.as_mut().poll(cx).map(|_| ()),
            None => Poll::Ready(()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.linger.is_none() {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        }
        self.poll_linger(cx).map(Ok)
    }
}
