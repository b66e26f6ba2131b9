//! A link of a bounded rate in front of a TCP server: a relay that passes on so many bytes a second, each way.
//!
//! Owns: its threads, which end with the process or the connections. Must not know: what it passes on.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is passed on at a time.
const PORTION_BYTES: usize = 64 << 10;
/// How much of a delay is caught up with: a thread that sleeps is awake a little later than it should be.
const CATCH_UP: Duration = Duration::from_millis(5);

/// One direction: when it is free again.
struct Lane {
    free: Mutex<Instant>,
    bytes_per_second: u64,
}

impl Lane {
    fn take(&self, bytes: usize) {
        let until = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let from = (*free).max(Instant::now().checked_sub(CATCH_UP).unwrap_or(*free));
            *free = from + Duration::from_nanos(bytes as u64 * 1_000_000_000 / self.bytes_per_second);
            *free
        };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut portion = vec![0; PORTION_BYTES];
        while let Ok(len @ 1..) = from.read(&mut portion) {
            self.take(len);
            if to.write_all(&portion[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }
}

/// Opens a link to a server; its own address. All its connections share its rate.
pub(super) fn open(server: SocketAddr, bytes_per_second: u64) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let lane = || Arc::new(Lane { free: Mutex::new(Instant::now()), bytes_per_second });
    let (there, back) = (lane(), lane());
    let pass_on = move |near: TcpStream| -> std::io::Result<()> {
        let far = TcpStream::connect(server)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let ends = (near.try_clone()?, far.try_clone()?);
        let (there, back) = (Arc::clone(&there), Arc::clone(&back));
        std::thread::spawn(move || there.pump(near, far));
        std::thread::spawn(move || back.pump(ends.1, ends.0));
        Ok(())
    };
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // Whoever has connected finds out.
            let _ = pass_on(near);
        }
    });
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_at_the_rate_and_come_back() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = open(server.local_addr().unwrap(), 20 << 20).unwrap();
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all[..5]).unwrap();
            all.len()
        });
        let begin = Instant::now();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&vec![7; 2 << 20]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!((answer, echo.join().unwrap()), (vec![7; 5], 2 << 20));
        assert!(begin.elapsed() > Duration::from_millis(95), "{:?}", begin.elapsed());
    }
}
