//! What NVMe/RDMA sends along with a connection's set-up (NVMe RDMA transport specification, "Fabric Dependent Settings": the private
//! data of rdma_cm's messages).
#![forbid(unsafe_code)]

use crate::nvme::bytes::{get_u16, put_u16};

/// RECFMT of the only format that there is.
const FORMAT: u16 = 0;

/// Of a request to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// QID: 0 for the admin queue.
    pub(crate) queue_id: u16,
    /// HRQSIZE: completions that the host has room for.
    pub(crate) receives: u16,
    /// HSQSIZE: the size of its submission queue, from 0.
    pub(crate) sends: u16,
    /// CNTLID, of hosts that say it: the controller that an I/O queue is for.
    pub(crate) cntlid: u16,
}

impl Request {
    pub(crate) const LEN: usize = 32;

    pub(crate) fn to_bytes(self) -> [u8; Request::LEN] {
        let mut bytes = [0; Request::LEN];
        put_u16(&mut bytes, 0, FORMAT);
        put_u16(&mut bytes, 2, self.queue_id);
        put_u16(&mut bytes, 4, self.receives);
        put_u16(&mut bytes, 6, self.sends);
        put_u16(&mut bytes, 8, self.cntlid);
        bytes
    }

    /// What the other end has sent; what follows it does not matter.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Request, Reject> {
        let bytes = bytes.get(..Request::LEN).ok_or(Reject::Length)?;
        if get_u16(bytes, 0) != FORMAT {
            return Err(Reject::Format);
        }
        Ok(Request {
            queue_id: get_u16(bytes, 2),
            receives: get_u16(bytes, 4),
            sends: get_u16(bytes, 6),
            cntlid: get_u16(bytes, 8),
        })
    }
}

/// Of an answer that lets the host in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Accept {
    /// CRQSIZE: commands that the controller has room for.
    pub(crate) receives: u16,
}

impl Accept {
    pub(crate) const LEN: usize = 32;

    pub(crate) fn to_bytes(self) -> [u8; Accept::LEN] {
        let mut bytes = [0; Accept::LEN];
        put_u16(&mut bytes, 0, FORMAT);
        put_u16(&mut bytes, 2, self.receives);
        bytes
    }

    /// `None`: it is not NVMe's.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Accept> {
        let bytes = bytes.get(..4)?;
        (get_u16(bytes, 0) == FORMAT).then(|| Accept { receives: get_u16(bytes, 2) })
    }
}

/// STS of an answer that does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reject {
    Length,
    Format,
    QueueId,
    Sends,
    Receives,
    Resources,
    ReadsAnswered,
    Reads,
    ControllerId,
    Other(u16),
}

impl Reject {
    pub(crate) const LEN: usize = 4;
    const ALL: [(u16, Reject); 9] = [
        (1, Reject::Length),
        (2, Reject::Format),
        (3, Reject::QueueId),
        (4, Reject::Sends),
        (5, Reject::Receives),
        (6, Reject::Resources),
        (7, Reject::ReadsAnswered),
        (8, Reject::Reads),
        (9, Reject::ControllerId),
    ];

    pub(crate) fn to_bytes(self) -> [u8; Reject::LEN] {
        let mut bytes = [0; Reject::LEN];
        let known = Reject::ALL.iter().find(|(_, reject)| *reject == self);
        let status = match self {
            Reject::Other(status) => status,
            _ => known.map_or(0, |(status, _)| *status),
        };
        put_u16(&mut bytes, 0, FORMAT);
        put_u16(&mut bytes, 2, status);
        bytes
    }

    /// `None`: the other end has said nothing of the kind.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Reject> {
        let bytes = bytes.get(..Reject::LEN)?;
        let status = get_u16(bytes, 2);
        if get_u16(bytes, 0) != FORMAT || status == 0 {
            return None;
        }
        Some(Reject::ALL.iter().find(|(known, _)| *known == status).map_or(Reject::Other(status), |it| it.1))
    }
}

impl std::fmt::Display for Reject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reject::Length => "it does not take the length of our private data",
            Reject::Format => "it does not know the format of our private data",
            Reject::QueueId => "it has no queue of this number",
            Reject::Sends => "it takes no submission queue of this size",
            Reject::Receives => "it takes no completion queue of this size",
            Reject::Resources => {
                "it has no resources left for another queue: fewer reactors need fewer queues"
            }
            Reject::ReadsAnswered => "it wants more RDMA reads than this device answers",
            Reject::Reads => "it answers fewer RDMA reads than this device wants",
            Reject::ControllerId => "it has no such controller",
            Reject::Other(status) => return write!(f, "status {status}, which is not known"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_where_linux_has_them() {
        // struct nvme_rdma_cm_req, _rep and _rej (include/linux/nvme-rdma.h).
        let request = Request { queue_id: 0x0302, receives: 0x0504, sends: 0x0706, cntlid: 0x0908 };
        let bytes = request.to_bytes();
        assert_eq!(bytes[..12], [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]);
        // rdma_cm fills up with zeroes.
        let padded = [&bytes[..], &[0; 24]].concat();
        assert_eq!(Request::from_bytes(&padded), Ok(request));
        assert_eq!(Request::from_bytes(&bytes[..31]), Err(Reject::Length));
        assert_eq!(Request::from_bytes(&[&[1], &bytes[1..]].concat()), Err(Reject::Format));
        assert_eq!(Accept { receives: 0x0201 }.to_bytes()[..5], [0, 0, 1, 2, 0]);
        assert_eq!(Accept::from_bytes(&Accept { receives: 7 }.to_bytes()), Some(Accept { receives: 7 }));
        assert_eq!(Reject::Resources.to_bytes(), [0, 0, 6, 0]);
        for (status, reject) in Reject::ALL {
            assert_eq!(reject.to_bytes(), [0, 0, u8::try_from(status).unwrap(), 0]);
            assert_eq!(Reject::from_bytes(&reject.to_bytes()), Some(reject));
        }
        assert_eq!(Reject::from_bytes(&[0, 0, 77, 0]), Some(Reject::Other(77)));
        // Somebody else's refusal has no such data, or zeroes.
        assert_eq!((Reject::from_bytes(&[0; 148]), Reject::from_bytes(&[])), (None, None));
    }
}
