//! Where NVMe-oF devices and discovery services are: `nvme+tcp://HOST:PORT/SUBNQN?nsid=1` (with `&hdr_digest=1&data_digest=1`
//! for digests), `nvme+rdma://HOST:PORT/SUBNQN?nsid=1`, and `tcp://HOST:PORT`.
#![forbid(unsafe_code)]

use crate::nvme;
use crate::tcp::Digests;
use std::fmt;
use std::str::FromStr;

/// `HOST:PORT`, the host as a name, an IPv4 address or an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpAddress {
    /// Without brackets.
    pub host: String,
    /// Not 0 where it is somewhere to connect to.
    pub port: u16,
}

/// The port that NVMe/TCP has from IANA; what is meant when a URI names none.
pub const PORT_DEFAULT: u16 = 4420;
/// The port of the discovery service, likewise.
pub const DISCOVERY_PORT_DEFAULT: u16 = 8009;

impl TcpAddress {
    fn parse(text: &str, port_default: u16) -> Result<TcpAddress, String> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(|| format!("{text:?} has no ]"))?;
                (host, port.strip_prefix(':').or((port.is_empty()).then_some("")))
            }
            None => match text.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => {
                    return Err(format!("{text:?}: an IPv6 address stands in brackets, such as [::1]:4420"));
                }
                Some((host, port)) => (host, Some(port)),
                None => (text, Some("")),
            },
        };
        let port = match port {
            Some("") => port_default,
            Some(port) => match port.parse() {
                Ok(port) if port != 0 => port,
                _ => return Err(format!("{port:?} is no port, want 1 to 65535")),
            },
            None => return Err(format!("{text:?} is no HOST:PORT")),
        };
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:%".contains(&byte);
        if host.is_empty() || !host.bytes().all(good) {
            return Err(format!("{host:?} is no host, want a name or an address"));
        }
        Ok(TcpAddress { host: host.to_owned(), port })
    }

    /// `tcp://HOST:PORT` or `rdma://HOST:PORT`, where a discovery service listens. If it names no port: 8009 over TCP, and 4420 over
    /// RDMA, which has none of its own for discovery.
    ///
    /// # Errors
    /// What is wrong and what would be right, for people.
    pub fn parse_discovery(text: &str) -> Result<(Transport, TcpAddress), String> {
        let after = |transport: Transport| {
            Some((transport, text.strip_prefix(transport.name())?.strip_prefix("://")?))
        };
        let scheme = Transport::ALL.into_iter().find_map(after).ok_or_else(|| "no scheme".to_owned());
        let parsed = scheme.and_then(|(transport, rest)| {
            let port = match transport {
                Transport::Tcp => DISCOVERY_PORT_DEFAULT,
                Transport::Rdma => PORT_DEFAULT,
            };
            Ok((transport, TcpAddress::parse(rest.strip_suffix('/').unwrap_or(rest), port)?))
        });
        parsed.map_err(|what| {
            format!("{text:?} is no discovery service: {what}; want tcp://HOST:PORT or rdma://HOST:PORT")
        })
    }
}

impl fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// What carries commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Transport {
    /// NVMe/TCP.
    #[default]
    Tcp,
    /// NVMe/RDMA.
    Rdma,
}

impl Transport {
    /// Both.
    pub const ALL: [Transport; 2] = [Transport::Tcp, Transport::Rdma];

    /// The word in URIs and addresses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Rdma => "rdma",
        }
    }
}

/// One path to one namespace: `nvme+tcp://HOST:PORT/SUBNQN?nsid=1`, or `nvme+rdma:`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NvmeUri {
    /// What carries commands there.
    pub transport: Transport,
    /// Where the controller listens.
    pub address: TcpAddress,
    /// The subsystem.
    pub subsystem_nqn: String,
    /// The namespace in it; 1 when not said.
    pub nsid: u32,
    /// `hdr_digest=1` and `data_digest=1`: a digest goes with each header, and with all data.
    pub digests: Digests,
}

impl FromStr for NvmeUri {
    type Err = String;

    fn from_str(text: &str) -> Result<NvmeUri, String> {
        parse_nvme(text).map_err(|what| {
            let scheme = if text.starts_with("nvme+rdma:") { "nvme+rdma" } else { "nvme+tcp" };
            format!("{text:?} is no NVMe device: {what}; want {scheme}://HOST:PORT/SUBNQN?nsid=1")
        })
    }
}

fn parse_nvme(text: &str) -> Result<NvmeUri, String> {
    let after = |transport: Transport| {
        Some((transport, text.strip_prefix("nvme+")?.strip_prefix(transport.name())?.strip_prefix("://")?))
    };
    let (transport, rest) = Transport::ALL.into_iter().find_map(after).ok_or("the scheme is another")?;
    let (address, rest) = rest.split_once('/').ok_or("it names no subsystem")?;
    let address = TcpAddress::parse(address, PORT_DEFAULT)?;
    let (nqn, query) = match rest.split_once('?') {
        Some((nqn, query)) => (nqn, Some(query)),
        None => (rest, None),
    };
    if !nvme::nqn_is_valid(nqn) {
        return Err(format!("{nqn:?} is no NQN, want nqn. and at most 223 bytes"));
    }
    let mut uri =
        NvmeUri { transport, address, subsystem_nqn: nqn.to_owned(), nsid: 1, digests: Digests::NONE };
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        let switch = |value: &str| match value {
            "0" => Ok(false),
            "1" => Ok(true),
            _ => Err(format!("{pair:?} is no switch, want 0 or 1")),
        };
        match pair.split_once('=') {
            // NSID FFFFFFFFh means all of them (base 3.2.1.2).
            Some(("nsid", value)) => match value.parse::<u32>() {
                Ok(nsid) if nsid != 0 && nsid != u32::MAX => uri.nsid = nsid,
                _ => return Err(format!("nsid {value:?} is no namespace, want 1 or more")),
            },
            Some(("hdr_digest" | "data_digest", _)) if transport == Transport::Rdma => {
                return Err(format!("{pair:?} is for nvme+tcp only: RDMA has checksums of its own"));
            }
            Some(("hdr_digest", value)) => uri.digests.header = switch(value)?,
            Some(("data_digest", value)) => uri.digests.data = switch(value)?,
            _ => return Err(format!("{pair:?} is not known, want nsid, hdr_digest or data_digest")),
        }
    }
    Ok(uri)
}

impl fmt::Display for NvmeUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NvmeUri { transport, address, subsystem_nqn, nsid, .. } = self;
        write!(f, "nvme+{}://{address}/{subsystem_nqn}?nsid={nsid}", transport.name())?;
        for (name, on) in [("hdr_digest", self.digests.header), ("data_digest", self.digests.data)] {
            if on {
                write!(f, "&{name}=1")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_uri_is_read_and_written() {
        for text in [
            "nvme+tcp://127.0.0.1:4420/nqn.2026-11.io.hawser:n0?nsid=1",
            "nvme+tcp://[fe80::1%eth0]:1/nqn.x?nsid=4294967294",
            "nvme+tcp://storage-1.example:65535/nqn.x?nsid=7",
            "nvme+tcp://h:1/nqn.x?nsid=7&hdr_digest=1&data_digest=1",
            "nvme+rdma://192.0.2.1:4420/nqn.x?nsid=7",
        ] {
            assert_eq!(text.parse::<NvmeUri>().unwrap().to_string(), text);
        }
        let short: NvmeUri = "nvme+tcp://h/nqn.x".parse().unwrap();
        assert_eq!(short.to_string(), "nvme+tcp://h:4420/nqn.x?nsid=1");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, what) in [
            ("nvme+xdma://h/nqn.x", "scheme"),
            ("nvme+tcp://h:4420", "no subsystem"),
            ("nvme+tcp://h:0/nqn.x", "\"0\" is no port"),
            ("nvme+tcp://h:70000/nqn.x", "\"70000\" is no port"),
            ("nvme+tcp://::1:4420/nqn.x", "brackets"),
            ("nvme+tcp://[::1/nqn.x", "no ]"),
            ("nvme+tcp://[::1]x/nqn.x", "no HOST:PORT"),
            ("nvme+tcp://:4420/nqn.x", "no host"),
            ("nvme+tcp://a b:4420/nqn.x", "no host"),
            ("nvme+tcp://h/iqn.x", "no NQN"),
            ("nvme+tcp://h/nqn.x?nsid=0", "no namespace"),
            ("nvme+tcp://h/nqn.x?nsid=4294967295", "no namespace"),
            ("nvme+tcp://h/nqn.x?ns=1", "not known"),
            ("nvme+tcp://h/nqn.x?nsid=1&", "\"\" is not known"),
            ("nvme+tcp://h/nqn.x?hdr_digest=yes", "want 0 or 1"),
        ] {
            let error = text.parse::<NvmeUri>().unwrap_err();
            assert!(error.contains(what), "{error}");
            assert!(error.contains("want nvme+tcp://HOST:PORT/SUBNQN?nsid=1"), "{error}");
        }
    }

    #[test]
    fn what_rdma_does_not_have_is_said() {
        let error = "nvme+rdma://h/nqn.x?data_digest=1".parse::<NvmeUri>().unwrap_err();
        assert!(error.contains("is for nvme+tcp only") && error.contains("want nvme+rdma://HOST"), "{error}");
    }

    #[test]
    fn a_discovery_service_is_read() {
        for (text, transport, want) in [
            ("tcp://h:1", Transport::Tcp, "h:1"),
            ("tcp://[::1]/", Transport::Tcp, "[::1]:8009"),
            ("rdma://h", Transport::Rdma, "h:4420"),
        ] {
            let (by, address) = TcpAddress::parse_discovery(text).unwrap();
            assert_eq!((by, address.to_string().as_str()), (transport, want));
        }
        assert!(TcpAddress::parse_discovery("h:1").unwrap_err().contains("want tcp://HOST:PORT"));
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "(nvme\\+tcp://)?\\PC{0,40}") {
            if let Ok(uri) = text.parse::<NvmeUri>() {
                prop_assert_eq!(uri.to_string().parse(), Ok(uri));
            }
        }
    }
}
