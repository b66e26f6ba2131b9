//! The harness's half of the shell in a guest (`guest/agent` is the other).
//!
//! Owns: the protocol over the guest's second serial port, which QEMU offers as a Unix socket: a script in, its output
//! and exit status out, always with a deadline.
//! Must not know: what the scripts do.
//! Invariants: one script at a time; an answer carries the number of its question, so that one left over from before a
//! time-out or a reboot is never taken for a newer one's.

#![forbid(unsafe_code)]

use crate::Result;
use crate::process::Deadline;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// What the agent says when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The kernel's boot id: another one after each reboot.
    pub boot_id: String,
    /// Seconds since the guest's kernel started, as text.
    pub uptime: String,
}

/// A script's output and exit status.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Standard output and standard error together.
    pub output: String,
    /// Exit status.
    pub status: i32,
}

/// A script that has been sent and not yet answered.
#[must_use = "a script that was started must be finished"]
pub struct Started(u64);

/// A connection to the agent.
pub struct Shell {
    stream: UnixStream,
    received: Vec<u8>,
    last: u64,
}

impl Shell {
    /// Connects to QEMU's socket at `path`.
    pub fn connect(path: &Path, deadline: &Deadline) -> Result<Self> {
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) => deadline.nap()?,
            }
        };
        stream.set_read_timeout(Some(Duration::from_millis(50))).map_err(|e| format!("guest shell: {e}"))?;
        Ok(Self { stream, received: Vec::new(), last: 0 })
    }

    /// The guest is in another QEMU now, whose socket `other` is connected to; ours has ended. What is on its way from the agent
    /// comes in two pieces.
    pub fn continue_at(&mut self, other: &mut Shell) -> Result<()> {
        let deadline = Deadline::new(10, "the end of a QEMU's guest shell");
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => break,
                Err(_) => drop(deadline.left()?),
            }
        }
        std::mem::swap(&mut self.stream, &mut other.stream);
        self.received.append(&mut other.received);
        Ok(())
    }

    /// The next line, or `None` if there is none within a moment.
    fn line(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()));
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err("guest shell: QEMU closed the connection".into()),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(e)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted]
                        .contains(&e.kind()) =>
                {
                    return Ok(None);
                }
                Err(e) => return Err(format!("guest shell: {e}")),
            }
        }
    }

    /// Waits for the agent to (re)start; `alive` is asked all the while whether waiting still makes sense.
    pub fn ready(&mut self, deadline: &Deadline, mut alive: impl FnMut() -> Result<()>) -> Result<Ready> {
        loop {
            if let Some(line) = self.line()? {
                let words: Vec<&str> = line.split(' ').collect();
                if let ["@ready", boot_id, uptime] = words[..] {
                    return Ok(Ready { boot_id: boot_id.into(), uptime: uptime.into() });
                }
            } else {
                alive()?;
                deadline.left()?;
            }
        }
    }

    /// Sends a script.
    pub fn start(&mut self, script: &str) -> Result<Started> {
        self.last += 1;
        let line = format!("@run {} {}\n", self.last, base64(script.as_bytes()));
        self.stream.write_all(line.as_bytes()).map_err(|e| format!("guest shell: {e}"))?;
        Ok(Started(self.last))
    }

    /// Waits for the answer to a script.
    pub fn finish(&mut self, started: Started, deadline: &Deadline) -> Result<Finished> {
        let mut encoded = String::new();
        let id = started.0.to_string();
        loop {
            let Some(line) = self.line()? else {
                deadline.left()?;
                continue;
            };
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["@out", number, text] if number == id => encoded += text,
                ["@end", number, status] if number == id => {
                    let output = String::from_utf8_lossy(&unbase64(&encoded)?).into_owned();
                    let status = status.parse().map_err(|_| format!("guest shell: status {status:?}"))?;
                    return Ok(Finished { output, status });
                }
                ["@ready", ..] => return Err("the guest rebooted while a script ran".into()),
                _ => {}
            }
        }
    }

    /// Runs a script that must succeed, within `seconds`; returns its output without the last newline.
    pub fn run(&mut self, script: &str, seconds: u64) -> Result<String> {
        let started = self.start(script)?;
        let finished = self.finish(started, &Deadline::new(seconds, format!("the guest's {script:?}")))?;
        if finished.status != 0 {
            return Err(format!(
                "guest: {script:?}: status {}: {}",
                finished.status,
                finished.output.trim_end()
            ));
        }
        Ok(finished.output.trim_end().to_owned())
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word =
            group.iter().enumerate().fold(0u32, |word, (i, byte)| word | u32::from(*byte) << (16 - 8 * i));
        for digit in 0..4 {
            let index = (word >> (18 - 6 * digit) & 63) as usize;
            text.push(if digit <= group.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}

fn unbase64(text: &str) -> Result<Vec<u8>> {
    let (mut bytes, mut word, mut bits) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for letter in text.bytes().filter(|letter| *letter != b'=') {
        let digit =
            ALPHABET.iter().position(|known| *known == letter).and_then(|digit| u32::try_from(digit).ok());
        let digit = digit.ok_or_else(|| format!("guest shell: {:?} is not base64", char::from(letter)))?;
        word = word << 6 | digit;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits).to_le_bytes()[0]);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    #[test]
    fn base64_is_the_standard_one_and_reads_back() {
        // RFC 4648, section 10.
        for (plain, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), text);
            assert_eq!(unbase64(text).unwrap(), plain.as_bytes());
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unbase64(&base64(&all)).unwrap(), all);
        assert!(unbase64("Zg*=").is_err());
    }

    #[test]
    fn stale_answer_is_not_taken_for_a_newer_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let mut shell = Shell { stream: ours, received: Vec::new(), last: 1 };
        let agent = std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            let asked = lines.next().unwrap().unwrap();
            (&theirs)
                .write_all(b"noise\n@out 1 b2xk\n@end 1 9\n@out 2 bmV3\n@out 2 Cg==\n@end 2 3\n")
                .unwrap();
            asked
        });
        let started = shell.start("exit 3").unwrap();
        let finished = shell.finish(started, &Deadline::new(10, "the agent")).unwrap();
        assert_eq!((finished.output.as_str(), finished.status), ("new\n", 3));
        assert_eq!(agent.join().unwrap(), "@run 2 ZXhpdCAz");
    }
}
