//! Sockets: the streams that sessions run over.

use std::io::{self, IoSlice};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::uri::Endpoint;

/// A connection of any kind.
pub enum Stream {
    /// A Unix socket.
    Unix(UnixStream),
    /// A TCP socket, which does not hold small messages back.
    Tcp(TcpStream),
    /// Anything else that reads and writes.
    Other(Box<dyn Duplex>),
}

/// Both directions of anything that reads and writes.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The half of a connection that reads.
pub type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;

/// The half of a connection that writes.
pub type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

impl Stream {
    /// Connects to a server.
    pub async fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Unix(path) => Ok(Self::Unix(UnixStream::connect(path).await?)),
            Endpoint::Tcp { host, port } => {
                Self::tcp(TcpStream::connect((host.as_str(), *port)).await?)
            }
        }
    }

    /// Wraps any stream.
    pub fn other(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self::Other(Box::new(stream))
    }

    /// Splits the connection so that one task can read while another writes.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Unix(stream) => {
                let (read, write) = stream.into_split();
                (Box::new(read), Box::new(write))
            }
            Self::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (Box::new(read), Box::new(write))
            }
            Self::Other(stream) => {
                let (read, write) = tokio::io::split(stream);
                (Box::new(read), Box::new(write))
            }
        }
    }

    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Other(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Other(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Other(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Other(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Other(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Other(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A socket that waits for clients; a Unix socket that it made is removed when it is dropped.
pub struct Listener {
    socket: ListenerSocket,
}

enum ListenerSocket {
    Unix {
        listener: UnixListener,
        made: Option<PathBuf>,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at a place; a Unix socket must not exist yet, except for one that nobody listens on.
    pub async fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        let socket = match endpoint {
            Endpoint::Unix(path) => ListenerSocket::Unix {
                listener: bind_unix(path).await?,
                made: Some(path.clone()),
            },
            Endpoint::Tcp { host, port } => {
                ListenerSocket::Tcp(TcpListener::bind((host.as_str(), *port)).await?)
            }
        };
        Ok(Self { socket })
    }

    /// Returns where clients reach the socket: the port that the system chose if 0 was asked for.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match &self.socket {
            ListenerSocket::Unix { listener, .. } => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().unwrap_or(Path::new(""));
                Ok(Endpoint::Unix(path.to_owned()))
            }
            ListenerSocket::Tcp(listener) => {
                let address = listener.local_addr()?;
                Ok(Endpoint::Tcp {
                    host: address.ip().to_string(),
                    port: address.port(),
                })
            }
        }
    }

    /// Waits for the next client and returns the connection and who it is.
    pub async fn accept(&self) -> io::Result<(Stream, String)> {
        match &self.socket {
            ListenerSocket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                // Advice: where the system allows less, it gives what it allows.
                let _ = set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER);
                let peer = match stream.peer_cred() {
                    Ok(cred) => format!("uid {} over a Unix socket", cred.uid()),
                    Err(_) => "Unix socket".to_owned(),
                };
                Ok((Stream::Unix(stream), peer))
            }
            ListenerSocket::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::tcp(stream)?, address.to_string()))
            }
        }
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self {
            socket: ListenerSocket::Unix {
                listener,
                made: None,
            },
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self {
            socket: ListenerSocket::Tcp(listener),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let ListenerSocket::Unix {
            made: Some(path), ..
        } = &self.socket
        {
            // Nothing can be done about a socket that is gone already or cannot be removed.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Writes all pieces in their order, as many as possible in one system call.
pub(super) async fn write_slices(
    write: &mut (impl AsyncWrite + Unpin),
    slices: &mut [IoSlice<'_>],
) -> io::Result<()> {
    let mut rest = slices;
    // Drops empty pieces at the front.
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        let most = rest.len().min(SLICES_AT_ONCE);
        let count = write
            .write_vectored(rest.get(..most).unwrap_or(&[]))
            .await?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut rest, count);
    }
    Ok(())
}

const SLICES_AT_ONCE: usize = 64;
/// Room for some long replies, so that a sender does not stop in the midst of each; as much as QEMU's servers ask for.
const UNIX_SEND_BUFFER: usize = 2 << 20;

async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(fault) if fault.kind() == io::ErrorKind::AddrInUse => {
            // A connection is refused by a regular file too, which must not be removed.
            let socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let left_over = matches!(
                UnixStream::connect(path).await,
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused
            );
            if !socket || !left_over {
                return Err(fault);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}
