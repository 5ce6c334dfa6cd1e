//! Options of TCP connections, to clients and to servers alike. Owns when a silent peer is taken for
//! gone; does not know what is said.

use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// A silent peer is asked for a sign of life after this, then so often and so many times.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// A peer that acknowledges, or reads, nothing for so long is taken for gone.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(300);

/// An event is a small packet that must not wait for the acknowledgement of the one before; and a
/// peer whose machine or network is gone sends no end, so silence has to tell.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MAX.as_millis() as u32)?;
    Ok(())
}
