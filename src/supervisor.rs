//! What whoever supervises this process is told, where it asks for that: systemd, by `NOTIFY_SOCKET`.
//!
//! That the process is ready or stops, and which process is the main one after a hand-over. Nobody is waited for, and a
//! supervisor that cannot be told is none.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use tracing::debug;

/// Where it is told, for this process and those that it starts.
const SOCKET: &str = "NOTIFY_SOCKET";

/// What there is to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Everything is served.
    Ready,
    /// The process is about to end.
    Stopping,
    /// Another process serves from now on: this one may end.
    Successor(u32),
}

impl News {
    fn text(self) -> String {
        match self {
            Self::Ready => "READY=1".into(),
            Self::Stopping => "STOPPING=1".into(),
            Self::Successor(pid) => format!("MAINPID={pid}"),
        }
    }
}

/// True where somebody wants to know.
pub fn is_there() -> bool {
    std::env::var_os(SOCKET).is_some()
}

/// Tells it, where somebody wants to know.
pub fn tell(news: News) {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    if let Err(error) = tell_at(Path::new(&socket), news) {
        debug!(%error, ?news, "the supervisor cannot be told");
    }
}

fn tell_at(socket: &Path, news: News) -> io::Result<()> {
    let address = match socket.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.send_to_addr(news.text().as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_supervisor_when_told_then_it_hears_each_line_at_either_kind_of_address() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().join("notify");
        let name = format!("kube-relay/test/supervisor/{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).expect("a short name");
        let supervisors = [
            (UnixDatagram::bind(&path).expect("a free name"), path),
            (UnixDatagram::bind_addr(&abstract_address).expect("a free name"), format!("@{name}").into()),
        ];

        for (supervisor, address) in supervisors {
            for (news, text) in
                [(News::Ready, "READY=1"), (News::Stopping, "STOPPING=1"), (News::Successor(7), "MAINPID=7")]
            {
                tell_at(&address, news).expect("somebody listens");
                let mut heard = [0; 64];
                let length = supervisor.recv(&mut heard).expect("it was sent");
                assert_eq!(&heard[..length], text.as_bytes());
            }
        }
    }

    #[test]
    fn given_a_supervisor_that_is_gone_when_told_then_that_is_an_error_and_nobody_waits() {
        tell_at(Path::new("/nowhere/notify"), News::Ready).expect_err("nobody is there");
    }
}
