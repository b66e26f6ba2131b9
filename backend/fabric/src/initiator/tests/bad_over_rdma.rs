//! What is missing or made up, over simulated verbs: each is told in one line, or ends one connection, and nobody else notices.

use super::client::Ask;
use super::over_rdma::{Lab, host_identity, lab};
use super::*;
use crate::initiator::socket::{QueueRequest, connect_command};
use crate::nvme::Sgl;
use crate::nvme::fabrics::CNTLID_DYNAMIC;
use crate::rdma::domain::{Domain, Purpose};
use crate::rdma::link::{End, Link};
use crate::rdma::private::{Reject, Request};
use crate::rdma::{KeyPolicy, words};
use crate::tcp::Digests;
use crate::uri::Transport;
use hawser_sim::verbs::{self, Denied};
use hawser_verbs_abi::{
    CmEvent, ConnectParameters, QueueSize, ReceiveRequest, Segment, SendRequest, WorkCompletion, event,
};
use std::net::SocketAddr;

#[test]
fn what_a_host_lacks_is_told_in_one_line_that_says_what_to_do() {
    let lab = lab(|_| {});
    let address = lab.address();
    for (denied, want) in [
        (Denied::Device, "this host has no RDMA device, want one"),
        (Denied::Access, "RDMA device sim0 cannot be opened, want /dev/infiniband readable and writable"),
        (Denied::Link, "RDMA device sim0 is down, want its link up"),
        (
            Denied::Network,
            "no RDMA device leads there (no such device), want an address on the network of sim0",
        ),
        (Denied::Route, "there is no route: network is unreachable"),
        (Denied::Windows, "has no memory windows of type 2B"),
        (Denied::Queues, "has no queue pair left: cannot allocate memory, want fewer reactors or paths"),
        (Denied::WindowsLeft, "has no memory window left: cannot allocate memory, want fewer reactors"),
        (Denied::Registrations(libc::ENOMEM), "want room for locked memory (LimitMEMLOCK=infinity"),
        (Denied::Registrations(libc::ENOSPC), "the device has no registrations left"),
        (Denied::Rejected(8), "nobody listens there, want an address at which an NVMe/RDMA target listens"),
        (Denied::Rejected(28), "it does not say why; does it speak NVMe/RDMA?"),
        (Denied::Stranger, "what listens there does not speak NVMe/RDMA"),
    ] {
        verbs::deny(Some(denied));
        let host = reactor("denied");
        let uri: NvmeUri = format!("nvme+rdma://{address}/{NQN}?nsid=1").parse().unwrap();
        let config = NvmeConfig::new("n1", vec![uri], host_identity());
        let device = NvmeDevice::open(config, &[host.handle().clone()]).unwrap();
        wait_until(&format!("{denied:?}: {want}, not {}", device.trouble()), || {
            device.trouble().contains(want)
        });
        assert!(!device.trouble().contains('\n'));
        drop((device, host));
        verbs::deny(None);
    }
    lab.end();
}

/// A host of our own making.
struct Stranger(Link);

impl Stranger {
    /// Asks to be let in, with this private data.
    fn connect(address: SocketAddr, private: &[u8]) -> Result<Stranger, Box<CmEvent>> {
        let mut end = End::open(&verbs::TABLE).unwrap();
        end.resolve_address(&address, PATIENCE).unwrap();
        end.resolve_route(PATIENCE).unwrap();
        for want in [event::ADDRESS_RESOLVED, event::ROUTE_RESOLVED] {
            assert_eq!(next_event(&mut end).kind, want);
        }
        let policy = Purpose::Initiator(KeyPolicy::Region);
        let domain = Domain::of(&verbs::TABLE, end.device(), policy).unwrap();
        let size = QueueSize { sends: 8, receives: 8, segments: 1 };
        let mut link = end.furnish(domain, size, 8192, 0).unwrap();
        let parameters = ConnectParameters {
            private: private.as_ptr(),
            private_len: u8::try_from(private.len()).unwrap(),
            responder_resources: 1,
            initiator_depth: 1,
        };
        link.connect(&parameters).unwrap();
        let answer = next_event(&mut link.end);
        if answer.kind == event::ESTABLISHED { Ok(Stranger(link)) } else { Err(Box::new(answer)) }
    }

    /// A keyed descriptor of the second page of its memory, by this key.
    fn keyed(&self, key: u32, invalidate: bool) -> Sgl {
        Sgl::keyed(self.0.memory.as_ptr() as u64 + 4096, 1024, key, invalidate)
    }

    fn send(&mut self, bytes: &[u8]) {
        let (start, local) = (self.0.memory.as_ptr(), self.0.keys.local);
        // SAFETY: the first page is ours, and no request names it yet.
        unsafe { start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let segment = |at: usize, len| Segment { address: start as u64 + at as u64, len, key: local };
        let message = segment(0, u32::try_from(bytes.len()).unwrap());
        let send = SendRequest { segments: &raw const message, segments_len: 1, ..SendRequest::NONE };
        // SAFETY: the link's memory; the segment lives until both are posted.
        unsafe {
            self.0.post_receives(&[ReceiveRequest { user: 1, segment: segment(2048, 64) }]).unwrap();
            self.0.post_sends(&[send]).unwrap();
        }
    }

    /// Waits until its queue pair has failed.
    fn must_end(&mut self, what: &str) {
        wait_until(&format!("{what}: the connection ends"), || {
            let mut completions = [WorkCompletion::NONE; 8];
            let count = self.0.poll(&mut completions).unwrap();
            completions[..count].iter().any(|completion| completion.status != 0)
        });
    }
}

fn next_event(end: &mut End) -> CmEvent {
    let mut event = None;
    wait_until("an event", || {
        event = end.channel.event().unwrap();
        event.is_some()
    });
    event.unwrap()
}

fn must_work(lab: &mut Lab) {
    let data = vec![7; 8192];
    assert_eq!(lab.client.run(Ask::write(8, 16, data.clone())).outcome, Ok(()));
    assert_eq!(lab.client.run(Ask::read(8, 16, 512)).data, data);
}

#[test]
fn private_data_that_is_made_up_is_refused_with_its_status() {
    let mut lab = lab(|_| {});
    let good = Request { queue_id: 0, receives: 32, sends: 31, cntlid: 0 };
    let mut strange = good.to_bytes();
    strange[0] = 9;
    for (private, want) in [
        (strange.to_vec(), Reject::Format),
        (Request { sends: 0, ..good }.to_bytes().to_vec(), Reject::Sends),
        (Request { sends: 4096, ..good }.to_bytes().to_vec(), Reject::Sends),
        (Request { receives: 0, ..good }.to_bytes().to_vec(), Reject::Receives),
    ] {
        let refused = Stranger::connect(lab.address(), &private).err().expect("a refusal");
        let said = Reject::from_bytes(&refused.private[..usize::from(refused.private_len)]);
        assert_eq!((refused.kind, said), (event::REJECTED, Some(want)), "{}", words::event(&refused));
        must_work(&mut lab);
    }
    lab.end();
}

#[test]
fn capsules_and_keys_that_are_made_up_end_their_connection_and_no_other() {
    let mut lab = lab(|_| {});
    let request = QueueRequest {
        host: host_identity(),
        subsystem_nqn: NQN.to_owned(),
        queue_id: 0,
        entries: 32,
        cntlid: CNTLID_DYNAMIC,
        keep_alive_ms: 0,
        digests: Digests::NONE,
        transport: Transport::Rdma,
        rdma_keys: KeyPolicy::Region,
        in_capsule_max: 0,
    };
    let private = Request { queue_id: 0, receives: 32, sends: 31, cntlid: 0 }.to_bytes();
    for (what, key) in [
        ("a capsule of ten bytes", None),
        ("a key of nobody", Some(0x7fff_0000)),
        ("a window's name", Some(0x9999_9900)),
    ] {
        let mut stranger =
            Stranger::connect(lab.address(), &private).unwrap_or_else(|event| panic!("{event:?}"));
        match key {
            None => stranger.send(&[0x55; 10]),
            Some(key) => {
                let (command, _) = connect_command(&request, 31, 0);
                stranger.send(&command.to_sqe(stranger.keyed(key, false)).to_bytes());
            }
        }
        stranger.must_end(what);
        must_work(&mut lab);
    }
    // One that is good, and whose own key cannot be invalidated: its connection ends with the answer.
    let mut stranger = Stranger::connect(lab.address(), &private).unwrap_or_else(|event| panic!("{event:?}"));
    let (command, data) = connect_command(&request, 31, 0);
    let data = data.to_bytes();
    // SAFETY: the second page of its memory, which no request names yet.
    unsafe {
        let place = stranger.0.memory.as_ptr().add(4096);
        place.copy_from_nonoverlapping(data.as_ptr(), data.len());
    }
    let remote = stranger.0.keys.remote;
    stranger.send(&command.to_sqe(stranger.keyed(remote, true)).to_bytes());
    stranger.must_end("an answer that invalidates what is no window");
    must_work(&mut lab);
    lab.end();
}
