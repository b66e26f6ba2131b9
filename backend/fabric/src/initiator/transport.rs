//! A queue pair on its way to the controller, over whichever transport: what lanes and the admin queue see of it.
//!
//! Owns: the choice between transports, made once for each connection. Must not know: bytes, keys.

use super::connection::TcpConnection;
use super::meter::{Loss, Moved};
use super::queue::{Ended, Transfer};
use super::rdma::RdmaConnection;
use super::socket::{ConnectedQueue, Wire};
use crate::nvme::Sqe;
use hawser_runtime::{Completed, Runtime, SourceId};

/// A queue pair on its connection. Both kinds keep the same promises: [`Connection::is_quiet`] says when what requests name is theirs
/// again.
pub(crate) enum Connection<T: Copy> {
    Tcp(Box<TcpConnection<T>>),
    Rdma(Box<RdmaConnection<T>>),
}

macro_rules! either {
    ($self:expr, $connection:ident => $call:expr) => {
        match $self {
            Connection::Tcp($connection) => $call,
            Connection::Rdma($connection) => $call,
        }
    };
}

impl<T: Copy> Connection<T> {
    /// Takes over a connected queue of which `source` will get the events, with keys from `first_key` to 3 beyond.
    pub(crate) fn new(
        runtime: &Runtime,
        source: SourceId,
        first_key: u32,
        queue: ConnectedQueue,
        depth: u16,
    ) -> Connection<T> {
        match queue.wire {
            Wire::Tcp(queue) => {
                Connection::Tcp(Box::new(TcpConnection::new(runtime, source, first_key, queue, depth)))
            }
            Wire::Rdma(pair) => {
                Connection::Rdma(Box::new(RdmaConnection::new(runtime, source, first_key, pair)))
            }
        }
    }

    /// How many more commands can be taken; none after an error.
    pub(crate) fn room(&self) -> usize {
        either!(self, connection => connection.room())
    }

    /// How many commands are under way.
    pub(crate) fn outstanding(&self) -> usize {
        either!(self, connection => connection.outstanding())
    }

    /// How many of these a reactor that waits for them should not spin for. Completions over RDMA come to shared memory: looking for
    /// them is what finds them soonest.
    pub(crate) fn unspun(&self, commands: usize) -> u64 {
        match self {
            Connection::Tcp(_) => commands as u64,
            Connection::Rdma(_) => 0,
        }
    }

    /// Takes a command, to be sent with the next [`Connection::flush`]. What `transfer` names must stay valid until it
    /// ended or was drained.
    pub(crate) fn submit(&mut self, sqe: Sqe, transfer: Transfer, user: T) {
        either!(self, connection => connection.submit(sqe, transfer, user));
    }

    /// Sends what was submitted.
    pub(crate) fn flush(&mut self) {
        either!(self, connection => connection.flush());
    }

    /// Takes the end of the operation `key`.
    pub(crate) fn handle(&mut self, key: u32, completed: Completed) {
        either!(self, connection => connection.handle(key, completed));
    }

    /// For a watching source: whether something has happened that no event tells of.
    pub(crate) fn peek(&mut self) -> bool {
        match self {
            Connection::Tcp(_) => false,
            Connection::Rdma(connection) => connection.peek(),
        }
    }

    /// For a watching source, before it sleeps: has events tell of what happens from now on. Whether something has happened.
    pub(crate) fn arm(&mut self) -> bool {
        match self {
            Connection::Tcp(_) => false,
            Connection::Rdma(connection) => connection.arm(),
        }
    }

    /// Handles what has happened that no event tells of.
    pub(crate) fn progress(&mut self) {
        if let Connection::Rdma(connection) = self {
            connection.progress();
        }
    }

    /// Why the connection is of no use any more.
    pub(crate) fn error(&self) -> Option<&str> {
        either!(self, connection => connection.error())
    }

    /// The kind of that.
    pub(crate) fn loss(&self) -> Loss {
        either!(self, connection => connection.loss())
    }

    /// How payload was moved since this was asked last.
    pub(crate) fn take_moved(&mut self) -> Moved {
        either!(self, connection => connection.take_moved())
    }

    /// Whether it may be that the memory of a request is gone.
    pub(crate) fn may_be_fault(&self) -> bool {
        match self {
            Connection::Tcp(connection) => connection.may_be_fault(),
            // What is registered is pinned: it stays, whoever takes it away from its file.
            Connection::Rdma(_) => false,
        }
    }

    /// Whether the target ended it, and so knows that it is over.
    pub(crate) fn was_ended_by_target(&self) -> bool {
        either!(self, connection => connection.was_ended_by_target())
    }

    /// Moves out the commands that have ended.
    pub(crate) fn ended(&mut self) -> std::vec::Drain<'_, Ended<T>> {
        either!(self, connection => connection.ended())
    }

    /// Gives the connection up: its operations become terminal soon, and what was not sent yet never is.
    pub(crate) fn close(&mut self) {
        either!(self, connection => connection.close());
    }

    /// Whether no operation is under way: what requests name is ours again.
    pub(crate) fn is_quiet(&self) -> bool {
        either!(self, connection => connection.is_quiet())
    }

    /// Takes out all commands that did not end, in order, each with whether any of it may have reached the controller.
    ///
    /// # Panics
    /// While operations are under way.
    pub(crate) fn drain(&mut self) -> Vec<(T, bool)> {
        either!(self, connection => connection.drain())
    }

    /// What is under way, to look at or to mark.
    pub(crate) fn users_mut(&mut self) -> Box<dyn Iterator<Item = &mut T> + '_> {
        match self {
            Connection::Tcp(connection) => Box::new(connection.users_mut()),
            Connection::Rdma(connection) => Box::new(connection.users_mut()),
        }
    }
}
