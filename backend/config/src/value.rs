//! The small values that a configuration consists of. Each checks itself when it is read, from TOML and from the API's
//! JSON alike, and its error says what was found and what would be right.

use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

macro_rules! text_value {
    ($type:ident) => {
        impl TryFrom<String> for $type {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}

/// The name of a device or disk: it appears in file names, URLs and metrics.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

text_value!(Name);

impl Name {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Name, String> {
        let plain = |c: char| c.is_ascii_alphanumeric();
        let ok = text.len() <= 64
            && text.starts_with(plain)
            && text.chars().all(|c| plain(c) || matches!(c, '-' | '_' | '.'));
        if !ok {
            return Err(format!(
                "{text:?} is no name, want up to 64 letters, digits, '-', '_' and '.', beginning with a letter or digit"
            ));
        }
        Ok(Name(text.to_owned()))
    }
}

/// A volume of a pool, `POOL/VOLUME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumePath {
    /// The pool.
    pub pool: Name,
    /// The volume in it.
    pub volume: Name,
}

text_value!(VolumePath);

impl fmt::Display for VolumePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.volume)
    }
}

impl FromStr for VolumePath {
    type Err = String;

    fn from_str(text: &str) -> Result<VolumePath, String> {
        let parts = text.split_once('/').map(|(pool, volume)| (pool.parse(), volume.parse()));
        let Some((Ok(pool), Ok(volume))) = parts else {
            return Err(format!(
                "{text:?} is no volume, want POOL/VOLUME, both up to 64 letters, digits, '-', '_' and '.'"
            ));
        };
        Ok(VolumePath { pool, volume })
    }
}

/// A number of bytes with a binary unit: `64KiB`, or `0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

text_value!(ByteSize);

impl ByteSize {
    const UNITS: [(&'static str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |shift: u32| self.0 > 0 && self.0.trailing_zeros() >= shift;
        match ByteSize::UNITS.iter().rev().find(|(_, shift)| whole(*shift)) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        let unit = ByteSize::UNITS.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let size = match unit {
            Some((number, shift)) if digits(number) => {
                number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift))
            }
            None if digits(text) && text.bytes().all(|byte| byte == b'0') => Some(0),
            _ => None,
        };
        size.map(ByteSize).ok_or_else(|| {
            format!("{text:?} is no size, want a number and its unit (KiB, MiB, GiB, TiB), such as 4GiB")
        })
    }
}

/// What a disk answers to GET_ID: at most 20 bytes (virtio 1.3, section 5.2.6).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(String);

text_value!(Serial);

impl Serial {
    /// VIRTIO_BLK_ID_BYTES.
    pub const LEN_MAX: usize = 20;

    /// The serial of a disk that has none configured: as much of its name as fits.
    #[must_use]
    pub fn from_name(name: &Name) -> Serial {
        Serial(name.as_str().chars().take(Serial::LEN_MAX).collect())
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Serial, String> {
        if text.len() > Serial::LEN_MAX {
            return Err(format!("{text:?} has {} bytes, want at most {}", text.len(), Serial::LEN_MAX));
        }
        if !text.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
            return Err(format!("{text:?} is no serial, want printable ASCII"));
        }
        Ok(Serial(text.to_owned()))
    }
}

/// Where a Unix socket is bound.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketPath(PathBuf);

text_value!(SocketPath);

impl SocketPath {
    /// `sun_path` has 108 bytes, one of them for the NUL.
    pub const LEN_MAX: usize = 107;

    /// As a path.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl FromStr for SocketPath {
    type Err = String;

    fn from_str(text: &str) -> Result<SocketPath, String> {
        if text.is_empty() || text.ends_with('/') || text.contains('\0') {
            return Err(format!("{text:?} is no socket, want a path such as \"/run/hawser/disk.sock\""));
        }
        if text.len() > SocketPath::LEN_MAX {
            return Err(format!(
                "{text:?} has {} bytes, want at most {} (the system's limit for sockets)",
                text.len(),
                SocketPath::LEN_MAX
            ));
        }
        Ok(SocketPath(PathBuf::from(text)))
    }
}

/// Permissions of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketMode(pub u32);

text_value!(SocketMode);

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for SocketMode {
    type Err = String;

    fn from_str(text: &str) -> Result<SocketMode, String> {
        let octal = (3..=4).contains(&text.len()) && text.chars().all(|c| c.is_digit(8));
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
        mode.map(SocketMode).ok_or_else(|| format!("{text:?} is no mode, want octal digits such as \"0660\""))
    }
}

/// A UUID, as text in the usual 8-4-4-4-12 form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Uuid(pub [u8; 16]);

text_value!(Uuid);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = String;

    fn from_str(text: &str) -> Result<Uuid, String> {
        let wrong =
            || format!("{text:?} is no UUID, want a form like \"0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff\"");
        let groups: Vec<&str> = text.split('-').collect();
        if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
            return Err(wrong());
        }
        let digits: Vec<u8> = groups
            .concat()
            .chars()
            .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Uuid(bytes))
    }
}

/// An NVMe qualified name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nqn(String);

text_value!(Nqn);

impl Nqn {
    /// NVMe base specification 2.0, section 4.5: at most 223 bytes.
    pub const LEN_MAX: usize = 223;

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Nqn {
    type Err = String;

    fn from_str(text: &str) -> Result<Nqn, String> {
        let ok = text.starts_with("nqn.")
            && text.len() <= Nqn::LEN_MAX
            && text.chars().all(|c| !c.is_whitespace() && !c.is_control());
        if !ok {
            return Err(format!(
                "{text:?} is no NQN, want up to {} bytes like \"nqn.2026-11.io.hawser:n0\"",
                Nqn::LEN_MAX
            ));
        }
        Ok(Nqn(text.to_owned()))
    }
}

/// Where a target listens: `tcp://ADDRESS:PORT`; port 0 lets the system choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Listen {
    /// What carries commands there.
    pub transport: Transport,
    /// The address.
    pub address: SocketAddr,
}

/// What carries commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// NVMe/TCP.
    Tcp,
    /// NVMe/RDMA.
    Rdma,
}

text_value!(Listen);

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Rdma => "rdma",
        };
        write!(f, "{scheme}://{}", self.address)
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        let of = |transport, scheme| {
            let address = text.strip_prefix(scheme)?.parse().ok()?;
            Some(Listen { transport, address })
        };
        of(Transport::Tcp, "tcp://").or_else(|| of(Transport::Rdma, "rdma://")).ok_or_else(|| {
            format!(
                "{text:?} is no address to listen at, want \"tcp://ADDRESS:PORT\" such as \"tcp://127.0.0.1:4420\", or \"rdma://ADDRESS:PORT\""
            )
        })
    }
}

/// Where another discovery service is: `tcp://ADDRESS:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Referral(pub SocketAddr);

text_value!(Referral);

impl fmt::Display for Referral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcp://{}", self.0)
    }
}

impl FromStr for Referral {
    type Err = String;

    fn from_str(text: &str) -> Result<Referral, String> {
        let address = text.strip_prefix("tcp://").and_then(|address| address.parse().ok());
        address.map(Referral).ok_or_else(|| {
            format!("{text:?} is no address of a discovery service, want \"tcp://ADDRESS:PORT\" such as \"tcp://192.0.2.10:8009\"")
        })
    }
}

/// The URI of a device, or several: one for each path to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Uris(pub Vec<String>);

impl<'de> Deserialize<'de> for Uris {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Uris, D::Error> {
        struct OneOrMany;

        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Uris;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a URI, or an array of URIs")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Uris, E> {
                Ok(Uris(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Uris, A::Error> {
                let mut uris = Vec::new();
                while let Some(uri) = seq.next_element()? {
                    uris.push(uri);
                }
                if uris.is_empty() {
                    return Err(de::Error::custom("[] names no path, want at least one URI"));
                }
                Ok(Uris(uris))
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_reads_what_it_writes() {
        let uuid: Uuid = "0f1e2d3c-4b5a-4978-8695-A4b3c2d1e0ff".parse().unwrap();
        assert_eq!(uuid.0[..5], [0x0f, 0x1e, 0x2d, 0x3c, 0x4b]);
        assert_eq!(uuid.to_string(), "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff");
        for wrong in ["", "0f1e2d3c4b5a49788695a4b3c2d1e0ff", "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0fg"] {
            assert!(wrong.parse::<Uuid>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units_and_read_back() {
        for (text, bytes) in
            [("0", 0), ("64KiB", 64 << 10), ("3MiB", 3 << 20), ("20GiB", 20 << 30), ("5TiB", 5 << 40)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        for wrong in ["", "4", "4GB", "-4GiB", "GiB", "4 GiB", "99999999999TiB", "0x1GiB"] {
            assert!(wrong.parse::<ByteSize>().unwrap_err().contains("want a number and its unit"), "{wrong}");
        }
    }

    #[test]
    fn a_volume_is_two_names() {
        let path: VolumePath = "p0/vm1-root".parse().unwrap();
        assert_eq!((path.pool.as_str(), path.volume.as_str()), ("p0", "vm1-root"));
        assert_eq!(path.to_string(), "p0/vm1-root");
        for wrong in ["", "p0", "/v", "p0/", "p0/a/b", "p0/-x"] {
            assert!(wrong.parse::<VolumePath>().unwrap_err().contains("want POOL/VOLUME"), "{wrong}");
        }
    }

    #[test]
    fn socket_mode_is_octal_text() {
        assert_eq!("0660".parse(), Ok(SocketMode(0o660)));
        assert_eq!(SocketMode(0o660).to_string(), "0660");
        for wrong in ["", "6", "0888", "01777", "rw-rw----", "+660"] {
            assert!(wrong.parse::<SocketMode>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_safe_in_file_names_and_urls() {
        for right in ["a", "vm1-root", "7.b_c"] {
            assert!(right.parse::<Name>().is_ok(), "{right}");
        }
        for wrong in ["", ".hidden", "a/b", "a b", "ä", "..", "-x", &"x".repeat(65)] {
            assert!(wrong.parse::<Name>().is_err(), "{wrong}");
        }
    }
}
