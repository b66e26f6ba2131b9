//! A disk that does nothing, at a vhost-user socket: `null_disk SOCKET [CPU [POLL_US [QUEUES]]]`. For measuring the rings
//! alone, and for trying a front end.

use hawser_block::{
    BlockSize, Channel, Completion, Device, DeviceState, Geometry, IoKind, Request, StatsSet,
};
use hawser_runtime::{ReactorConfig, ReactorThread, Runtime, SourceId};
use hawser_virtio::{DiskConfig, SocketAccess, VhostDisk};
use std::sync::Arc;
use std::time::Duration;

struct Null;

struct NullChannel(Vec<Completion>);

impl Channel for NullChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.0.extend(batch.drain(..).map(|request| Completion { token: request.token, outcome: Ok(()) }));
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.0);
    }
}

impl Device for Null {
    fn name(&self) -> &'static str {
        "null"
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(Geometry::new(BlockSize::B512, 8 << 20))
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, _: &Runtime, _: SourceId) -> Box<dyn Channel> {
        Box::new(NullChannel(Vec::with_capacity(1024)))
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::default()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("which socket?")?;
    let cpu = arguments.next().filter(|cpu| cpu != "-").map(|cpu| cpu.parse()).transpose()?;
    let poll_us = arguments.next().map_or(Ok(20), |us| us.parse())?;
    let queues = arguments.next().map_or(Ok(1), |queues| queues.parse())?;
    let reactor = ReactorThread::spawn("reactor", ReactorConfig { cpu, poll_us })?;
    let config = DiskConfig {
        name: "null".into(),
        socket: socket.into(),
        access: SocketAccess::default(),
        serial: "null".into(),
        queues,
        read_only: false,
        drain_timeout: Duration::from_secs(10),
        index: 0,
        crash: None,
    };
    let disk = VhostDisk::start(config, Arc::new(Null), vec![reactor.handle().clone()])?;
    loop {
        std::thread::sleep(Duration::from_secs(5));
        let queue = &disk.queue_counters()[0];
        let read = disk.stats().kind(IoKind::Read);
        println!(
            "{} requests {} batches {} kicks {} interrupts {} mistakes {} p50 {} ns {}",
            disk.state().name(),
            queue.requests.get(),
            queue.batches.get(),
            queue.kicks.get(),
            queue.interrupts.get(),
            queue.mistakes.get(),
            read.latency.quantile_ns(500),
            disk.trouble(),
        );
    }
}
