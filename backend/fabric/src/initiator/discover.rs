//! Asks a discovery service what it knows, for the command line: blocks its caller, on a reactor of its own.

use super::admin::{ADMIN_ENTRIES, Admin};
use super::config::HostIdentity;
use super::socket::{self, QueueRequest};
use crate::nvme::DISCOVERY_NQN;
use crate::nvme::discovery::Entry;
use crate::nvme::fabrics::CNTLID_DYNAMIC;
use crate::rdma::KeyPolicy;
use crate::tcp::Digests;
use crate::uri::{TcpAddress, Transport};
use hawser_runtime::{ReactorConfig, ReactorThread, Runtime};
use std::sync::mpsc;

/// Reads the discovery log of the service at an address. Never called on a reactor's thread.
///
/// # Errors
/// One line: who was asked and what went wrong.
pub fn discover(
    (transport, address): &(Transport, TcpAddress),
    host: &HostIdentity,
) -> Result<Vec<Entry>, String> {
    let transport = *transport;
    let reactor = ReactorThread::spawn("discover", ReactorConfig::default())
        .map_err(|error| format!("cannot run a reactor: {error}"))?;
    let (sender, receiver) = mpsc::sync_channel(1);
    let (wanted, host) = (address.clone(), host.clone());
    reactor.handle().run(move |runtime| {
        let own = runtime.clone();
        runtime.spawn(async move {
            // The asker waits for this, unless its thread was ended.
            let _ = sender.send(ask(&own, (transport, &wanted), host).await);
        });
    });
    let answer = receiver.recv().unwrap_or_else(|_| Err("the reactor ended".to_owned()));
    answer.map_err(|why| format!("{address}: {why}"))
}

async fn ask(
    runtime: &Runtime,
    (transport, address): (Transport, &TcpAddress),
    host: HostIdentity,
) -> Result<Vec<Entry>, String> {
    let request = QueueRequest {
        host,
        subsystem_nqn: DISCOVERY_NQN.to_owned(),
        queue_id: 0,
        entries: ADMIN_ENTRIES,
        cntlid: CNTLID_DYNAMIC,
        // We are gone before a keep-alive would be due.
        keep_alive_ms: 0,
        digests: Digests::NONE,
        transport,
        // Only a log is read, into memory of the connection's own: that a device has no windows does not matter.
        rdma_keys: KeyPolicy::Region,
        in_capsule_max: 0,
    };
    let mut last = "the name has no address".to_owned();
    for address in socket::resolve(address).await? {
        match socket::connect_queue(runtime, &address, &request).await {
            Err(error) => last = error.why,
            Ok(queue) => {
                let admin = Admin::new(runtime, queue);
                admin.enable().await?;
                let entries = admin.discovery_log().await?;
                admin.close().await;
                return Ok(entries);
            }
        }
    }
    Err(last)
}
