//! Sockets without HTTP: servers and clients that do with a connection what no library would.

use std::future::Future;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A server that hands every connection to `handle`, with its number.
pub async fn serve<F, T>(handle: F) -> String
where
    F: Fn(TcpStream, usize) -> T + Send + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port().to_string();
    tokio::spawn(async move {
        for number in 0.. {
            let Ok((stream, _)) = listener.accept().await else { return };
            let _ = stream.set_nodelay(true);
            tokio::spawn(handle(stream, number));
        }
    });
    port
}

/// Reads one request, head and body of a known length; `None` when the client closed.
pub async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut text = Vec::new();
    loop {
        if let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&text[..end]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.trim().parse().expect("a length"));
            if text.len() >= end + 4 + length {
                return Some(String::from_utf8_lossy(&text).into_owned());
            }
        }
        let mut buffer = [0; 16 * 1024];
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(read) => text.extend_from_slice(&buffer[..read]),
        }
    }
}

/// A JSON answer on a connection that stays open.
pub fn ok(body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

/// Sends bytes and reads until the other side closes, or says nothing for a while.
pub async fn talk(port: u16, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    stream.write_all(bytes).await.expect("it reads");
    read_rest(&mut stream).await
}

/// Reads until the other side closes, or says nothing for a while.
pub async fn read_rest(stream: &mut TcpStream) -> String {
    const QUIET: Duration = Duration::from_secs(1);
    let mut text = Vec::new();
    let mut buffer = [0; 16 * 1024];
    while let Ok(Ok(read @ 1..)) = tokio::time::timeout(QUIET, stream.read(&mut buffer)).await {
        text.extend_from_slice(&buffer[..read]);
    }
    String::from_utf8_lossy(&text).into_owned()
}
