//! The process that hands over: it comes to a standstill, tells what it has, and lets go of it or goes on.
//!
//! What does not move stays and comes to its end here: connections that are on their way to a backend, since who waits for
//! them is a task of this process in the middle of its tries; those that reach one after the standstill has begun; and
//! those for which there is no descriptor left. Of UDP flows those stay behind whose backend has refused: there is nothing to
//! move but a memory of that, and the client's next datagram begins anew in either process.
//!
//! Nothing here waits for the network; every call waits for threads that answer within a turn of their loop.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use tracing::{debug, warn};

use crate::handover::parcel::Parcel;
use crate::handover::services::CountersSaid;
use crate::handover::{flows, services, streams};
use crate::serve::estate::Estate;
use crate::serve::moving_flow::Unanswered;
use crate::serve::moving_stream::WorkerLines;

/// A process at a standstill. Dropped, it goes on as before.
#[derive(Debug)]
pub(crate) struct Exporter {
    estate: Estate,
    workers: WorkerLines,
    /// Connections that stand still.
    streams: usize,
    told_streams: ToldCount,
    told_flows: ToldCount,
    /// What was said of counters.
    counted: RefCell<CountersSaid>,
    /// When it was told which clients stay where.
    pins_said_at: Instant,
    released: bool,
}

/// Which clients stay where: said before the standstill, as it may be very much. What has changed by then is said once more.
pub(crate) fn pins(estate: &Estate, now: Instant) -> impl Iterator<Item = Parcel> {
    services::pins(estate, now)
}

/// How many were told of so far.
#[derive(Debug, Default)]
pub(super) struct ToldCount(Cell<usize>);

impl ToldCount {
    pub(super) fn add(&self, more: usize) {
        self.0.set(self.get() + more);
    }

    fn get(&self) -> usize {
        self.0.get()
    }
}

impl Exporter {
    /// Brings all that can be handed over to a standstill: from the return on, no byte of it moves. Late is better: clients
    /// wait from here on.
    ///
    /// `pins_said_at`: when [`pins`] were asked for.
    ///
    /// # Errors
    /// A thread does not answer. Then all goes on.
    pub(crate) fn freeze(estate: Estate, pins_said_at: Instant) -> Result<Self, Unanswered> {
        let workers = estate.tcp.lines();
        let (told_streams, told_flows, counted) = Default::default();
        let mut frozen =
            Self { estate, workers, streams: 0, told_streams, told_flows, counted, pins_said_at, released: false };
        frozen.streams = frozen.workers.rest()?;
        frozen.estate.udp.rest()?;
        debug!(streams = frozen.streams, "connections and flows stand still");
        Ok(frozen)
    }

    /// How many connections stand still. Those for which no descriptor is left are not told of.
    #[cfg(test)]
    pub(crate) fn streams(&self) -> usize {
        self.streams
    }

    /// How many connections, and how many flows, were told of.
    pub(crate) fn told(&self) -> (usize, usize) {
        (self.told_streams.get(), self.told_flows.get())
    }

    /// What was said of counters. Nothing the second time.
    pub(super) fn take_counted(&self) -> CountersSaid {
        self.counted.take()
    }

    /// All there is to say, made as it is asked for: so that few copies of descriptors are there at a time. To be asked for
    /// once, and to its end: what was not said stays here.
    ///
    /// An error is the last there is. Then nothing may be [released](Self::release): some may have been told that nobody heard of.
    pub(crate) fn parcels(&self) -> impl Iterator<Item = Result<Parcel, Unanswered>> {
        let services = services::parcels(&self.estate, Instant::now(), self.pins_said_at, &self.counted).map(Ok);
        let flows = flows::losses(&self.estate.udp).chain(flows::parcels(&self.estate.udp, &self.told_flows));
        services.chain(flows).chain(streams::parcels(&self.workers, &self.told_streams))
    }

    /// It is the other process's: lets go of all that was told of, and of every listener. No connection or flow ends by that,
    /// and nobody is let in here any more. The other process goes on with these at once, and may let clients in when this has
    /// returned: as long as an event loop here watches a listener, it may be the only one that the kernel tells of a client.
    ///
    /// # Errors
    /// A thread does not answer; it does so when it can.
    pub(crate) fn release(mut self) -> Result<(), Unanswered> {
        self.released = true;
        let left = self.streams.saturating_sub(self.told_streams.get());
        if left > 0 {
            warn!(
                left,
                reason = "fd_limit",
                "no descriptor was left to hand over some connections: they come to their end in this process"
            );
        }
        // Before connections let go of their addresses: no route is removed here any more, and nothing that leads answers here.
        drop(self.estate.vips.leave());
        self.estate.reply_path.leave();
        let flows = self.estate.udp.leave();
        self.workers.leave().and(flows)
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if !self.released {
            self.workers.go_on();
            self.estate.udp.go_on();
        }
    }
}
