//! Reaches a backend: one try, and the ladder of tries that one connection may climb.
//!
//! *The ladder.* A backend that gives no answer is left after the time of the current step, and the
//! next try, at the next backend, has the time of the next step. A backend that says no (refused,
//! unreachable, no source port towards it) costs no step: the next one is asked at once. Nobody is
//! asked twice while another is left. When all were asked and steps are left, those that were silent
//! are asked again, as each step is longer than the last: a single backend that is far away is reached.
//! Those that said no are not asked again. Whatever happens, the ladder ends after the sum of its steps.
//! What a try gave is told to the balancer, which leaves out for a time who fails again and again (`ejection`).
//!
//! Where clients' addresses are to be preserved, a try begins from the client's own, and goes on from this node's where no
//! answer comes (`preserve`).
//!
//! A try also ends when its endpoint is removed meanwhile. Who gives up is reset in `tcp`, not here.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use socket2::SockRef;
use tracing::debug;

use crate::local_ports::may_be_chosen;
use crate::name::Family;
use crate::plan::TcpSettings;
use crate::serve::balancer::{Backend, Balancer, Tried};
use crate::serve::deadline::{before, within_a_turn};
use crate::serve::ejection::PROBE;
use crate::serve::preserve::{PROOF, Side};
use crate::serve::socket;
use crate::serve::stream::Stream;
use crate::serve::way_back::{ClientKey, Evidence};
use crate::stats::{ConnectFailure, DropReason, SourceFallback};

/// How backends are connected to.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// How long each silent try may take.
    pub steps: Steps,
    /// Failed tries in a row after which a backend gets nothing for a time; `None`: never. Default 5. From `--eject-after`.
    pub eject_after: Option<NonZeroU8>,
    /// The addresses that backends see. Default: the kernel chooses.
    pub sources: Sources,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { steps: Steps::default(), eject_after: NonZeroU8::new(5), sources: Sources::default() }
    }
}

/// The times of silent tries: each has twice the time of the one before. Their sum is the longest that a client waits.
///
/// Default 250 ms, 500 ms, 1 s, 2 s, as the classic userspace mode had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Of the first. From `--connect-timeout`.
    pub first: Duration,
    /// How many there are. From `--connect-tries`.
    pub count: NonZeroU8,
}

impl Default for Steps {
    fn default() -> Self {
        Self { first: Duration::from_millis(250), count: NonZeroU8::new(4).expect("4 is not 0") }
    }
}

impl Steps {
    /// No clock goes further than some years.
    const LONGEST: Duration = Duration::from_secs(24 * 3_600);

    /// As a Service wants them.
    fn of_service(self, settings: &TcpSettings) -> Self {
        Self {
            first: settings.connect_timeout.unwrap_or(self.first),
            count: settings.connect_tries.unwrap_or(self.count),
        }
    }

    /// The time of a try after so many silent ones; `None` where there is no further one.
    fn after(self, silent: u8) -> Option<Duration> {
        let time = self.first.saturating_mul(2_u32.saturating_pow(silent.into()));
        (silent < self.count.get()).then_some(time.min(Self::LONGEST))
    }

    /// The longest that a client waits.
    pub fn total(self) -> Duration {
        self.first.saturating_mul(2_u32.saturating_pow(self.count.get().into()) - 1).min(Self::LONGEST)
    }
}

/// The address that a backend sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// The kernel chooses: the address of this node towards the backend.
    #[default]
    Any,
    /// One of this node's addresses; the port is chosen per destination.
    Address(IpAddr),
    /// The client's own address and port. Needs CAP_NET_ADMIN, and answers that come back through this node: where they do
    /// not, the ladder goes on as with `Any`.
    Client(SocketAddr),
}

/// The addresses of this node that its connections to backends come from, in turn. From `--upstream-source`.
///
/// One address has about 28,000 ports towards one backend, and each is lost for a minute where this side closed
/// first; two addresses have twice as many. Each backend has a turn of its own: with one for all, which goes in step with
/// the backends' turn, each backend would always meet the same address.
#[derive(Clone, Debug, Default)]
pub struct Sources(Arc<SourceRing>);

#[derive(Debug, Default)]
struct SourceRing {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
}

impl Sources {
    /// Any number of addresses of either family; a family without one leaves the choice to the kernel.
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let (v4, v6) = addresses.into_iter().partition(IpAddr::is_ipv4);
        Self(Arc::new(SourceRing { v4, v6 }))
    }

    /// Each source once, for the next connection to a backend that has had so many.
    fn towards(&self, backend: SocketAddr, connections: u64) -> impl Iterator<Item = Source> {
        let SourceRing { v4, v6 } = &*self.0;
        let addresses = if backend.is_ipv4() { v4 } else { v6 };
        let first = connections.checked_rem(addresses.len() as u64).unwrap_or(0) as usize;
        let (later, sooner) = addresses.split_at(first);
        let any = addresses.is_empty().then_some(Source::Any);
        sooner.iter().chain(later).copied().map(Source::Address).chain(any)
    }
}

/// One try failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach {address}: {reason}")]
pub struct ConnectError {
    /// The backend.
    pub address: SocketAddr,
    /// Why, in one word.
    pub reason: ConnectFailure,
    /// What the kernel said.
    pub source: io::Error,
}

impl ConnectError {
    fn new(address: SocketAddr, source: io::Error) -> Self {
        Self { address, reason: classify(&source), source }
    }
}

/// A backend and the connection to it.
#[derive(Debug)]
pub(crate) struct Reached {
    /// Who was reached.
    pub(crate) backend: Arc<Backend>,
    /// The connection; nothing was written.
    pub(crate) stream: Stream,
}

/// Tries to connect to one backend, for as long as the kernel does: the caller sets the time.
///
/// # Errors
/// [`ConnectError`], with a reason that tells the backend's fault from this host's.
pub(crate) async fn connect(backend: &Backend, source: Source) -> Result<Stream, ConnectError> {
    let address = backend.address();
    open(address, source).await.map_err(|source| ConnectError::new(address, source))
}

/// Reaches a backend of the balancer for a client, by the ladder. Counts failures and retries, and in `tries` each backend
/// that it asks.
///
/// # Errors
/// Why the client has to be turned away.
pub(crate) async fn dial(
    balancer: &Balancer,
    client: IpAddr,
    source: Source,
    options: &ConnectOptions,
    tries: &mut u32,
) -> Result<Reached, DropReason> {
    let mut ladder = Ladder::new(balancer, client, options);
    loop {
        let backend = ladder.next_backend()?;
        ladder.count_attempt();
        *tries += 1;
        match ladder.attempt(&backend, source).await {
            Ok(stream) => {
                balancer.note_success(&backend, Instant::now());
                return Ok(Reached { backend, stream });
            }
            Err(missed) => ladder.note(&backend, &missed)?,
        }
    }
}

/// Why a try did not give a connection.
#[derive(Debug)]
enum Missed {
    /// It failed.
    Failed(ConnectError),
    /// The backend, or a policy before it, said no to the client's own address, and not to the node's nor to other clients':
    /// that concerns this client alone, so it is no failure of the backend.
    Denied(ConnectError),
    /// The endpoint was removed while it was being tried: not its fault, and no use either.
    Left,
}

/// The tries of one connection. Lives in a box while the connection is being made.
struct Ladder<'a> {
    balancer: &'a Balancer,
    client: IpAddr,
    sources: &'a Sources,
    steps: Steps,
    eject_after: Option<NonZeroU8>,
    end: Instant,
    /// Tries so far, of any outcome.
    attempts: usize,
    /// Silent tries so far.
    silent: u8,
    /// Not to be asked in this round.
    tried: Tried,
    /// Not to be asked again at all.
    denied: Tried,
    /// The word for the client where nothing worse happens.
    verdict: DropReason,
}

impl<'a> Ladder<'a> {
    /// A connect that is still open after this long looks whether its endpoint is still wanted.
    const LOOK: Duration = Duration::from_millis(50);

    /// A step is at least this many times what the last connect to the same backend took.
    const PATIENCE: u32 = 4;

    /// A connect that took so long has lost a packet, and has had to wait for the kernel to send it again: that says
    /// nothing about the way.
    const LOSSY: Duration = Duration::from_secs(1);

    fn new(balancer: &'a Balancer, client: IpAddr, options: &'a ConnectOptions) -> Self {
        let ConnectOptions { steps, eject_after, sources } = options;
        let (mut steps, mut eject_after) = (*steps, *eject_after);
        if let Some(settings) = balancer.tcp_settings() {
            steps = steps.of_service(&settings);
            eject_after = settings.eject_after.map_or(eject_after, |of_service| of_service.0);
        }
        Self {
            balancer,
            client,
            sources,
            steps,
            eject_after,
            end: Instant::now() + steps.total(),
            attempts: 0,
            silent: 0,
            tried: Tried::default(),
            denied: Tried::default(),
            verdict: DropReason::NoEndpoints,
        }
    }

    /// Whom to try now.
    fn next_backend(&mut self) -> Result<Arc<Backend>, DropReason> {
        if self.steps.after(self.silent).is_none() || Instant::now() >= self.end {
            return Err(self.verdict);
        }
        let next = self.pick().or_else(|| {
            let silent = self.tried.count() > self.denied.count();
            self.tried = self.denied.clone();
            silent.then(|| self.pick()).flatten()
        });
        next.ok_or(self.verdict)
    }

    fn pick(&self) -> Option<Arc<Backend>> {
        self.balancer.pick(self.client, &self.tried, Instant::now())
    }

    fn count_attempt(&mut self) {
        if self.attempts > 0 {
            self.balancer.port.stats.retries.increment();
        }
        self.attempts += 1;
    }

    /// One try at a backend.
    async fn attempt(&self, backend: &Backend, source: Source) -> Result<Stream, Missed> {
        match source {
            Source::Any => self.attempt_from_node(backend).await,
            Source::Address(_) => self.attempt_from(source, backend, self.patience(backend)).await,
            Source::Client(client) => self.attempt_as(client, backend).await,
        }
    }

    /// From the client's own address, and from this node's where no answer to that one comes.
    async fn attempt_as(&self, client: SocketAddr, backend: &Backend) -> Result<Stream, Missed> {
        let port = &self.balancer.port;
        let now = Instant::now();
        let side = port.preserve.side(client.ip(), backend, now);
        let side = match side {
            Ok(side) if backend.may_have_way_back(side, client.ip(), now) => side,
            other => {
                let reason = other.err().unwrap_or(SourceFallback::NoWayBack);
                port.preserve.stats.fallbacks.count(reason);
                return self.attempt_from_node(backend).await;
            }
        };
        let patience = self.patience_for_proof(backend);
        match self.attempt_from(Source::Client(client), backend, patience).await {
            Ok(stream) => {
                backend.note_way_back(side, Instant::now());
                port.preserve.stats.preserved.increment();
                Ok(stream)
            }
            Err(Missed::Failed(error)) => match error.reason {
                ConnectFailure::Timeout => self.attempt_past_proof(side, client.ip(), patience, backend).await,
                ConnectFailure::FdLimit | ConnectFailure::Memory => Err(Missed::Failed(error)),
                _ if is_from_network(&error.source) => self.attempt_past_refusal(side, error, backend).await,
                // No port of the client's address is left towards this backend, or this host does not let it out.
                _ => {
                    let outcome = self.attempt_from_node(backend).await;
                    if outcome.is_ok() {
                        port.preserve.stats.fallbacks.count(SourceFallback::LocalPorts);
                    }
                    outcome
                }
            },
            Err(missed) => Err(missed),
        }
    }

    /// Somebody has said no to the client's address. Where this node hears the same, it is the backend's failure. Where it does
    /// not, that client is meant alone if others were let in, and else whoever is not this node. Nothing follows for the way
    /// back, as it is not known who has said so.
    async fn attempt_past_refusal(&self, side: Side, error: ConnectError, backend: &Backend) -> Result<Stream, Missed> {
        let lets_others_in = backend.has_way_back(side, Instant::now());
        let stream = self.attempt_from_node(backend).await?;
        if lets_others_in {
            return Err(Missed::Denied(error));
        }
        self.balancer.port.preserve.stats.fallbacks.count(SourceFallback::Refused);
        Ok(stream)
    }

    /// No answer to the client's address has come. Where the backend answers this node, and in less time, that is why.
    async fn attempt_past_proof(
        &self,
        side: Side,
        client: IpAddr,
        waited: Duration,
        backend: &Backend,
    ) -> Result<Stream, Missed> {
        let (port, begin) = (&self.balancer.port, Instant::now());
        let outcome = self.attempt_from_node(backend).await;
        let answers = match &outcome {
            Ok(_) => true,
            Err(Missed::Failed(error)) => error.reason == ConnectFailure::Refused,
            Err(Missed::Denied(_) | Missed::Left) => false,
        };
        if answers && begin.elapsed() < waited / 2 {
            let client = ClientKey::of(client);
            backend.note_no_way_back(side, client, Evidence::Clear, &port.name, Instant::now());
        }
        port.preserve.stats.fallbacks.count(SourceFallback::NoWayBack);
        outcome
    }

    /// From this node; one try from each of its sources, where these have no port left towards the backend.
    async fn attempt_from_node(&self, backend: &Backend) -> Result<Stream, Missed> {
        let mut sources = self.sources.towards(backend.address(), backend.stats.connections.get()).peekable();
        loop {
            let source = sources.next().unwrap_or_default();
            match self.attempt_from(source, backend, self.patience(backend)).await {
                Err(Missed::Failed(error))
                    if error.reason == ConnectFailure::LocalPorts && sources.peek().is_some() =>
                {
                    backend.stats.connect_failures.count(error.reason);
                }
                outcome => return outcome,
            }
        }
    }

    async fn attempt_from(&self, source: Source, backend: &Backend, patience: Duration) -> Result<Stream, Missed> {
        let begin = Instant::now();
        let mut connecting = pin!(connect(backend, source));
        // A backend nearby answers that fast, and then no timer has to be set and cleared.
        let outcome = match within_a_turn(connecting.as_mut()).await {
            Some(outcome) => outcome,
            None => self.outlast(connecting, backend, begin, patience).await?,
        };
        if !self.balancer.serves(backend) {
            return Err(Missed::Left);
        }
        let (stream, took) = (outcome.map_err(Missed::Failed)?, begin.elapsed());
        if took < Self::LOSSY {
            backend.stats.connect_us.set(took.as_micros() as u64);
        }
        backend.stats.connect_time.observe(took);
        Ok(stream)
    }

    /// Waits for a backend as long as its step allows, and as its endpoint is wanted.
    async fn outlast<T>(
        &self,
        mut connecting: Pin<&mut impl Future<Output = Result<T, ConnectError>>>,
        backend: &Backend,
        begin: Instant,
        patience: Duration,
    ) -> Result<Result<T, ConnectError>, Missed> {
        let until = (begin + patience).min(self.end);
        loop {
            let look = (Instant::now() + Self::LOOK).min(until);
            match before(look, connecting.as_mut()).await {
                Some(outcome) => return Ok(outcome),
                None if !self.balancer.serves(backend) => return Err(Missed::Left),
                None if Instant::now() >= until => {
                    return Ok(Err(ConnectError::new(backend.address(), io::ErrorKind::TimedOut.into())));
                }
                None => {}
            }
        }
    }

    /// The time of the current step, and more for a backend that is known to be far; not too much more where others wait
    /// for what this client meets.
    fn patience(&self, backend: &Backend) -> Duration {
        let last = Duration::from_micros(backend.stats.connect_us.get());
        let step = self.steps.after(self.silent).unwrap_or_default().max(last.saturating_mul(Self::PATIENCE));
        if backend.is_ejected() { step.min(PROBE) } else { step }
    }

    /// How long an answer to a client's address may take: no longer than leaves as much for one to this node.
    fn patience_for_proof(&self, backend: &Backend) -> Duration {
        let last = Duration::from_micros(backend.stats.connect_us.get());
        let left = self.patience(backend).min(self.end.saturating_duration_since(Instant::now()));
        PROOF.max(last.saturating_mul(Self::PATIENCE)).min(left / 2)
    }

    /// Draws the conclusions from a missed try; an error where another try would be useless.
    fn note(&mut self, backend: &Backend, missed: &Missed) -> Result<(), DropReason> {
        self.tried.add(backend);
        let (error, is_failure) = match missed {
            Missed::Failed(error) => (error, true),
            Missed::Denied(error) => (error, false),
            Missed::Left => {
                self.denied.add(backend);
                return Ok(());
            }
        };
        debug!(
            service = %self.balancer.port.name, backend = %backend.address(), client = %self.client,
            attempt = self.attempts, reason = %error.reason, error = %error.source, "backend not reached"
        );
        backend.stats.connect_failures.count(error.reason);
        match error.reason {
            // This host's trouble, and the same for each backend.
            ConnectFailure::FdLimit => return Err(DropReason::FdLimit),
            ConnectFailure::Memory => return Err(DropReason::Memory),
            ConnectFailure::Timeout => self.silent += 1,
            _ => self.denied.add(backend),
        }
        if let Some(eject_after) = self.eject_after
            && is_failure
            && error.reason != ConnectFailure::LocalPorts
        {
            self.balancer.note_failure(backend, error.reason, eject_after, Instant::now());
        }
        let word = match (error.reason, is_failure) {
            (_, false) => DropReason::DeniedAddress,
            (ConnectFailure::LocalPorts, true) => DropReason::LocalPorts,
            _ => DropReason::EjectedAll,
        };
        let is_first_or_same = [DropReason::NoEndpoints, word].contains(&self.verdict);
        self.verdict = if is_first_or_same { word } else { DropReason::EjectedAll };
        Ok(())
    }
}

/// Sets no option: those that a connection needs once it lasts are set in `lasting`, and TCP_NODELAY in `direction`.
async fn open(address: SocketAddr, source: Source) -> io::Result<Stream> {
    let stream = Stream::new(begin(address, source)?)?;
    stream.connected().await?;
    if met_itself(&stream, address)? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// Opens a socket that is connecting.
fn begin(address: SocketAddr, source: Source) -> io::Result<OwnedFd> {
    match source {
        Source::Client(client) => match begin_as(client, address) {
            // Another connection from there has that port, it is one of the first 1,024 and not for us, or the kernel (before
            // 6.3) cannot take a port of its own range without taking it from everybody.
            Err(error) if is_port_denied(&error) => begin_as(SocketAddr::new(client.ip(), 0), address),
            outcome => outcome,
        },
        Source::Address(own) => {
            let socket = socket::open_tcp(Family::of(address.ip()))?;
            socket::bind_source(&socket, SocketAddr::new(own, 0))?;
            connecting(socket, address)
        }
        Source::Any => connecting(socket::open_tcp(Family::of(address.ip()))?, address),
    }
}

/// From an address of somebody else: from its own port, so that the backend sees both, or with 0 from any.
fn begin_as(client: SocketAddr, address: SocketAddr) -> io::Result<OwnedFd> {
    let family = Family::of(address.ip());
    let socket = socket::open_tcp(family)?;
    socket::allow_foreign_source(&socket, family)?;
    let from = SocketAddr::new(client.ip(), client.port());
    match client.port() {
        0 => socket::bind_source(&socket, from)?,
        port if may_be_chosen(port) => socket::choose_source(&socket, from)?,
        _ => socket::bind_shared_source(&socket, from)?,
    }
    connecting(socket, address)
}

fn connecting(socket: OwnedFd, address: SocketAddr) -> io::Result<OwnedFd> {
    socket::begin_connect(&socket, address)?;
    Ok(socket)
}

fn is_port_denied(error: &io::Error) -> bool {
    let denied = [Errno::ADDRINUSE, Errno::ADDRNOTAVAIL, Errno::ACCESS, Errno::NOPROTOOPT];
    Errno::from_io_error(error).is_some_and(|errno| denied.contains(&errno))
}

/// True where it came from the backend or from the way there, and not from this host.
fn is_from_network(error: &io::Error) -> bool {
    let refusals = [Errno::CONNREFUSED, Errno::CONNRESET, Errno::HOSTUNREACH, Errno::NETUNREACH];
    Errno::from_io_error(error).is_some_and(|errno| refusals.contains(&errno))
}

/// True where nobody listened and the kernel, choosing a source port, connected the socket to itself.
///
/// That can only happen on an address of this host, on a port out of the range of source ports: one call less elsewhere.
fn met_itself(stream: &Stream, backend: SocketAddr) -> io::Result<bool> {
    const FIRST_SOURCE_PORT: u16 = 32_768; // The kernel's default for net.ipv4.ip_local_port_range.
    Ok(backend.port() >= FIRST_SOURCE_PORT && SockRef::from(stream).local_addr()?.as_socket() == Some(backend))
}

/// The word for what the kernel said.
fn classify(error: &io::Error) -> ConnectFailure {
    let Some(errno) = Errno::from_io_error(error) else {
        return match error.kind() {
            io::ErrorKind::TimedOut => ConnectFailure::Timeout,
            io::ErrorKind::ConnectionRefused => ConnectFailure::Refused,
            _ => ConnectFailure::Unreachable,
        };
    };
    match errno {
        Errno::CONNREFUSED => ConnectFailure::Refused,
        Errno::TIMEDOUT => ConnectFailure::Timeout,
        Errno::CONNRESET | Errno::CONNABORTED | Errno::PIPE => ConnectFailure::Reset,
        Errno::ADDRNOTAVAIL | Errno::ADDRINUSE => ConnectFailure::LocalPorts,
        Errno::MFILE | Errno::NFILE => ConnectFailure::FdLimit,
        // NOSPC: the event loop takes no more, as the kernel's memory for watches is used up.
        Errno::NOMEM | Errno::NOBUFS | Errno::NOSPC => ConnectFailure::Memory,
        _ => ConnectFailure::Unreachable, // No route, a prohibiting route or rule, a network or host that is down.
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    use super::*;
    use crate::serve::balancer::Table;
    use crate::serve::scripted::{
        LOOPBACK, backends, balancer, black_hole, echo, on_worker, refusing, soon, spawn, until,
    };
    use crate::stats::Entry;

    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    /// A ladder for tests that climb to its end: 150 ms.
    fn quick() -> ConnectOptions {
        steps(Duration::from_millis(10), 4)
    }

    fn steps(first: Duration, count: u8) -> ConnectOptions {
        let steps = Steps { first, count: NonZeroU8::new(count).expect("a number of tries") };
        ConnectOptions { steps, ..ConnectOptions::default() }
    }

    async fn dial(balancer: &Balancer, options: &ConnectOptions) -> Result<Reached, DropReason> {
        soon(super::dial(balancer, CLIENT, Source::Any, options, &mut 0)).await
    }

    fn failures(backend: &Backend, reason: ConnectFailure) -> u64 {
        backend.stats.connect_failures.get(reason)
    }

    fn own_address(stream: &Stream) -> IpAddr {
        SockRef::from(stream).local_addr().expect("a connection").as_socket().expect("an IP address").ip()
    }

    #[test]
    fn given_the_defaults_when_added_up_then_a_client_waits_3750_ms_at_most() {
        let steps = ConnectOptions::default().steps;

        assert_eq!(steps.total(), Duration::from_millis(3_750));
        let each: Vec<_> = (0..).map_while(|silent| steps.after(silent)).map(|time| time.as_millis()).collect();
        assert_eq!(each, [250, 500, 1_000, 2_000]);
        let absurd = Steps { first: Duration::MAX, count: NonZeroU8::MAX };
        assert_eq!((absurd.total(), absurd.after(254)), (Steps::LONGEST, Some(Steps::LONGEST)));
    }

    #[test]
    fn given_a_backend_when_it_is_reached_then_the_time_it_took_is_known() {
        on_worker(async {
            let [web] = backends([echo().await]);

            let reached = dial(&balancer(&[Arc::clone(&web)]), &ConnectOptions::default()).await.expect("reached");

            assert_eq!(reached.backend.id, web.id);
            assert!(web.stats.connect_us.get() > 0);
        });
    }

    #[test]
    fn t161_given_a_backend_that_refuses_when_dialed_then_the_next_is_reached_at_once() {
        on_worker(async {
            let (_held, dead) = refusing();
            let [dead, alive] = backends([dead, echo().await]);
            let web = balancer(&[dead.clone(), alive.clone()]);
            let begin = Instant::now();

            let reached = dial(&web, &ConnectOptions::default()).await.expect("the other one");

            assert_eq!(reached.backend.id, alive.id);
            assert!(begin.elapsed() < Steps::default().first, "no step was waited for");
            assert_eq!(failures(&dead, ConnectFailure::Refused), 1);
            assert_eq!(web.port.stats.retries.get(), 1);
        });
    }

    #[test]
    fn t162_given_a_black_hole_when_dialed_then_the_next_is_reached_after_the_first_step() {
        on_worker(async {
            let (_held, silent) = black_hole();
            let [silent, alive] = backends([silent, echo().await]);
            let web = balancer(&[silent.clone(), alive.clone()]);
            let begin = Instant::now();

            let reached = dial(&web, &ConnectOptions::default()).await.expect("the other one");

            assert_eq!(reached.backend.id, alive.id);
            let first = Steps::default().first;
            assert!((first..3 * first).contains(&begin.elapsed()), "{:?}", begin.elapsed());
            assert_eq!(failures(&silent, ConnectFailure::Timeout), 1);
        });
    }

    #[test]
    fn t163_given_only_black_holes_when_dialed_then_it_ends_after_all_steps() {
        on_worker(async {
            let (_held, one) = black_hole();
            let (_also_held, two) = black_hole();
            let all = backends([one, two]);
            let web = balancer(&all);
            let begin = Instant::now();

            let verdict = dial(&web, &quick()).await.expect_err("nobody");

            assert_eq!(verdict, DropReason::EjectedAll);
            assert!(begin.elapsed() >= quick().steps.total());
            assert_eq!(all.map(|backend| failures(&backend, ConnectFailure::Timeout)), [2, 2], "each in turn");
            assert_eq!(web.port.stats.retries.get(), 3);
        });
    }

    #[test]
    fn t165_given_backends_that_refuse_when_all_were_asked_then_none_is_asked_again() {
        on_worker(async {
            let held = [refusing(), refusing(), refusing(), refusing(), refusing(), refusing()];
            let all = backends(held.each_ref().map(|(_, address)| *address));
            let web = balancer(&all);

            let verdict = dial(&web, &ConnectOptions::default()).await.expect_err("nobody");

            assert_eq!(verdict, DropReason::EjectedAll);
            assert!(all.iter().all(|backend| failures(backend, ConnectFailure::Refused) == 1));
        });
    }

    #[test]
    fn t165_given_one_silent_backend_and_one_that_refuses_when_dialed_then_only_the_silent_one_is_asked_again() {
        on_worker(async {
            let ((_held, silent), (_also_held, dead)) = (black_hole(), refusing());
            let [silent, dead] = backends([silent, dead]);

            dial(&balancer(&[silent.clone(), dead.clone()]), &quick()).await.expect_err("nobody");

            assert_eq!(failures(&silent, ConnectFailure::Timeout), 4);
            assert_eq!(failures(&dead, ConnectFailure::Refused), 1);
        });
    }

    #[test]
    fn t166_given_a_dial_in_flight_when_its_endpoint_is_removed_then_the_next_is_chosen() {
        on_worker(async {
            let (_held, silent) = black_hole();
            let [silent, alive] = backends([silent, echo().await]);
            let web = balancer(std::slice::from_ref(&silent));
            let patient = steps(Duration::from_secs(3_600), 4);

            let dialing = spawn({
                let web = Arc::clone(&web);
                async move { dial(&web, &patient).await }
            });
            let waiting = Arc::clone(&silent);
            until(|| Arc::strong_count(&waiting) > 3).await; // The table's, the test's two, and the dial's.
            web.swap(Table::new(vec![alive.clone()].into(), &[]));
            let reached = soon(dialing).await.expect("the other one");

            assert_eq!(reached.backend.id, alive.id);
            assert_eq!(failures(&silent, ConnectFailure::Timeout), 0, "not its fault");
        });
    }

    #[test]
    fn given_no_backend_when_dialed_then_the_verdict_says_so() {
        on_worker(async {
            assert_eq!(dial(&balancer(&[]), &quick()).await.expect_err("nobody"), DropReason::NoEndpoints);
        });
    }

    #[test]
    fn given_a_backend_that_is_far_when_tried_again_then_the_step_is_longer() {
        let [far] = backends([SocketAddr::from((LOOPBACK, 9))]);
        let web = balancer(std::slice::from_ref(&far));
        let options = ConnectOptions::default();
        let ladder = Ladder::new(&web, CLIENT, &options);

        assert_eq!(ladder.patience(&far), options.steps.first);
        far.stats.connect_us.set(200_000);

        assert_eq!(ladder.patience(&far), Duration::from_millis(800));
    }

    #[test]
    fn f07_given_a_patient_service_when_an_ejected_backend_is_tried_again_then_the_others_do_not_wait_for_all_of_that()
    {
        let all = backends([SocketAddr::from((LOOPBACK, 9)), SocketAddr::from((LOOPBACK, 10))]);
        let web = balancer(&all);
        let options = steps(Duration::from_secs(60), 4);
        let ladder = Ladder::new(&web, CLIENT, &options);

        web.note_failure(&all[0], ConnectFailure::Timeout, NonZeroU8::MIN, Instant::now());

        assert_eq!(all.each_ref().map(|backend| ladder.patience(backend)), [PROBE, options.steps.first]);
    }

    fn eject_after(failures: u8) -> ConnectOptions {
        ConnectOptions { eject_after: NonZeroU8::new(failures), ..steps(Duration::from_millis(50), 4) }
    }

    #[test]
    fn f07_given_a_backend_that_refuses_when_dialed_five_times_then_it_is_asked_no_more() {
        on_worker(async {
            let (_held, dead) = refusing();
            let [dead, alive] = backends([dead, echo().await]);
            let web = balancer(&[dead.clone(), alive.clone()]);

            for _ in 0..30 {
                let reached = dial(&web, &ConnectOptions::default()).await.expect("the other one");
                assert_eq!(reached.backend.id, alive.id);
            }

            assert_eq!(failures(&dead, ConnectFailure::Refused), 5);
            assert_eq!((dead.stats.ejections.get(), web.port.stats.retries.get()), (1, 5));
        });
    }

    #[test]
    fn f08_given_a_black_hole_when_dialed_then_one_client_for_each_failure_waits_and_none_after_it_is_ejected() {
        on_worker(async {
            let (_held, silent) = black_hole();
            let [silent, alive] = backends([silent, echo().await]);
            let web = balancer(&[silent.clone(), alive]);
            let options = eject_after(2);

            for _ in 0..20 {
                dial(&web, &options).await.expect("the other one");
            }

            assert_eq!(failures(&silent, ConnectFailure::Timeout), 2);
            assert_eq!(silent.stats.ejections.get(), 1);
        });
    }

    #[test]
    fn given_ejection_that_is_off_when_a_backend_refuses_then_it_is_asked_in_each_turn() {
        on_worker(async {
            let (_held, dead) = refusing();
            let [dead, alive] = backends([dead, echo().await]);
            let web = balancer(&[dead.clone(), alive]);

            for _ in 0..30 {
                dial(&web, &eject_after(0)).await.expect("the other one");
            }

            assert!(failures(&dead, ConnectFailure::Refused) >= 15);
            assert_eq!(dead.stats.ejections.get(), 0);
        });
    }

    #[test]
    fn f07_given_an_ejected_backend_when_all_others_refuse_then_it_is_reached_and_in_again() {
        on_worker(async {
            let (_held, dead) = refusing();
            let [dead, alive] = backends([dead, echo().await]);
            let web = balancer(&[dead, alive.clone()]);
            let one = NonZeroU8::MIN;
            web.note_failure(&alive, ConnectFailure::Timeout, one, Instant::now());
            assert!(alive.out_for(Instant::now()).is_some());

            let reached = dial(&web, &ConnectOptions::default()).await.expect("the last resort");

            assert_eq!(reached.backend.id, alive.id);
            assert!(alive.out_for(Instant::now()).is_none());
        });
    }

    #[test]
    fn t140_f33_given_a_pinned_backend_that_refuses_when_dialed_then_another_is_reached_and_pinned_at_once() {
        on_worker(async {
            let (_held, dead) = refusing();
            let [dead, alive, other] = backends([dead, echo().await, echo().await]);
            let web = balancer(&[dead.clone(), alive, other]);
            web.port.affinity.set_timeout(Some(Duration::from_secs(60)));
            let pinned = web.pick(CLIENT, &Tried::default(), Instant::now()).expect("a backend");
            assert_eq!(pinned.id, dead.id);

            let first = dial(&web, &ConnectOptions::default()).await.expect("another one").backend.id;
            let second = dial(&web, &ConnectOptions::default()).await.expect("the same one").backend.id;

            assert_eq!(first, second);
            assert_eq!(failures(&dead, ConnectFailure::Refused), 1);
        });
    }

    #[test]
    fn given_a_service_with_settings_of_its_own_when_dialed_then_these_count() {
        let all = backends([SocketAddr::from((LOOPBACK, 9))]);
        let web = balancer(&all);
        let settings = TcpSettings {
            connect_timeout: Some(Duration::from_millis(40)),
            connect_tries: NonZeroU8::new(2),
            eject_after: Some(crate::value::OrNone(None)),
            ..TcpSettings::default()
        };
        web.swap(Table::new(all.to_vec().into(), &[]).with_settings(Some(Arc::new(settings))));

        let options = ConnectOptions::default();
        let ladder = Ladder::new(&web, CLIENT, &options);

        assert_eq!(ladder.steps.total(), Duration::from_millis(120));
        assert_eq!(ladder.eject_after, None);
    }

    /// F15: that this host has no port left is no fault of the backend.
    #[test]
    fn f15_given_no_source_port_when_dialed_again_and_again_then_nobody_is_ejected() {
        on_worker(async {
            let all = backends([echo().await, echo().await]);
            let foreign = Sources::new([IpAddr::from([192, 0, 2, 7])]);
            let options = ConnectOptions { sources: foreign, ..ConnectOptions::default() };
            let web = balancer(&all);

            for _ in 0..10 {
                assert_eq!(dial(&web, &options).await.expect_err("no port"), DropReason::LocalPorts);
            }

            assert!(all.iter().all(|backend| backend.out_for(Instant::now()).is_none()));
        });
    }

    /// The kernel asks a second time after a second: steps that end before it each begin with a question of their own.
    #[test]
    fn t165_given_a_single_backend_that_is_silent_at_first_when_dialed_then_it_is_asked_again_and_reached() {
        on_worker(async {
            let (mut held, silent) = black_hole();
            let web = balancer(&backends([silent]));
            let dialing = spawn(async move { dial(&web, &steps(Duration::from_millis(50), 8)).await });

            tokio::time::sleep(Duration::from_millis(100)).await; // The silence is the case.
            let listener = held.swap_remove(0);
            held.clear();
            listener.accept().expect("what fills its queue");

            soon(dialing).await.expect("reached by a later step");
        });
    }

    #[test]
    fn given_a_source_address_when_connected_then_the_backend_sees_it() {
        on_worker(async {
            let (peer_of, mut seen) = tokio::sync::mpsc::unbounded_channel();
            let address = crate::serve::scripted::backend(move |stream| {
                let _ = peer_of.send(stream.peer_addr().expect("a connection"));
                async {}
            });
            let [web] = backends([address.await]);
            let source = IpAddr::from([127, 82, 0, 1]);

            let stream = soon(connect(&web, Source::Address(source))).await;

            assert_eq!(own_address(&stream.expect("reached")), source);
            assert_eq!(soon(seen.recv()).await.expect("a connection").ip(), source);
        });
    }

    #[test]
    fn given_sources_of_both_families_when_asked_then_each_comes_in_turn_and_only_to_its_own() {
        let [one, two] = [[127, 82, 0, 3], [127, 82, 0, 4]].map(IpAddr::from);
        let sources = Sources::new([one, two]);
        let [v4, v6] = ["192.0.2.9:80", "[2001:db8::9]:80"].map(|address| address.parse().expect("an address"));
        let [first, second, third] = [0, 1, 2].map(|had| sources.towards(v4, had).collect::<Vec<_>>());

        assert_eq!(first, [Source::Address(one), Source::Address(two)]);
        assert_eq!(second, [Source::Address(two), Source::Address(one)]);
        assert_eq!(third, first);
        assert_eq!(sources.towards(v6, 1).collect::<Vec<_>>(), [Source::Any]);
    }

    #[test]
    fn given_upstream_sources_when_clients_come_then_backends_see_them_in_turn() {
        on_worker(async {
            let [web] = backends([echo().await]);
            let web = balancer(&[web]);
            let addresses = [[127, 82, 0, 3], [127, 82, 0, 4]].map(IpAddr::from);
            let options = ConnectOptions { sources: Sources::new(addresses), ..ConnectOptions::default() };

            for address in addresses.into_iter().chain(addresses) {
                let reached = dial(&web, &options).await.expect("reached");
                reached.backend.stats.connections.add(Entry::ClusterIp, 1); // As whoever relays it does.
                assert_eq!(own_address(&reached.stream), address);
            }
        });
    }

    /// T168: an address that cannot be bound stands for one without a port left: the kernel's word is the same.
    #[test]
    fn t168_given_a_source_without_a_port_when_dialed_then_the_next_source_reaches_the_same_backend() {
        on_worker(async {
            let [web] = backends([echo().await]);
            let foreign = IpAddr::from([192, 0, 2, 7]);
            let own = IpAddr::from([127, 82, 0, 5]);
            let options = ConnectOptions { sources: Sources::new([foreign, own]), ..ConnectOptions::default() };

            let reached = dial(&balancer(std::slice::from_ref(&web)), &options).await.expect("by the other source");

            assert_eq!(own_address(&reached.stream), own);
            assert_eq!(failures(&web, ConnectFailure::LocalPorts), 1);
        });
    }

    #[test]
    fn t168_given_no_source_with_a_port_when_dialed_then_the_verdict_says_so() {
        on_worker(async {
            let [web] = backends([echo().await]);
            let foreign = [[192, 0, 2, 7], [192, 0, 2, 8]].map(IpAddr::from);
            let options = ConnectOptions { sources: Sources::new(foreign), ..ConnectOptions::default() };

            let verdict = dial(&balancer(std::slice::from_ref(&web)), &options).await.expect_err("no port");

            assert_eq!(verdict, DropReason::LocalPorts);
            assert_eq!(failures(&web, ConnectFailure::LocalPorts), 2);
        });
    }

    /// Needs CAP_NET_ADMIN to be more than a refusal with a reason.
    #[test]
    fn given_the_clients_own_address_when_connected_then_it_is_seen_or_refused_with_a_reason() {
        on_worker(async {
            let [web] = backends([echo().await]);
            let client = SocketAddr::from(([127, 82, 0, 2], 40_000));

            let outcome = soon(connect(&web, Source::Client(client))).await;

            match outcome {
                Ok(stream) => assert_eq!(own_address(&stream), client.ip()),
                Err(error) => assert_eq!(error.source.kind(), io::ErrorKind::PermissionDenied),
            }
        });
    }

    /// The kernel may choose the very port that is connected to; here it has to.
    #[test]
    fn given_a_socket_that_met_itself_when_asked_then_it_is_told() {
        on_worker(async {
            let (held, address) = refusing();
            drop(held);
            let socket = socket::open_tcp(Family::V4).expect("a socket");
            SockRef::from(&socket).bind(&address.into()).expect("a free port");
            socket::begin_connect(&socket, address).expect("a try");
            let stream = Stream::new(socket).expect("an event loop");
            soon(stream.connected()).await.expect("itself");

            assert!(met_itself(&stream, address).expect("a connection"));
            assert_eq!(stream.send(b"x").expect("itself"), 1);
            assert_eq!(soon(poll_fn(|cx| stream.poll_receive(cx, &mut [0]))).await.expect("itself"), 1);
        });
    }

    #[test]
    fn given_what_the_kernel_says_when_classified_then_the_backends_fault_is_told_from_ours() {
        let word = |errno: Errno| classify(&errno.into());

        assert_eq!(word(Errno::CONNREFUSED), ConnectFailure::Refused);
        assert_eq!(word(Errno::HOSTUNREACH), ConnectFailure::Unreachable);
        assert_eq!(word(Errno::CONNRESET), ConnectFailure::Reset);
        assert_eq!(word(Errno::ADDRNOTAVAIL), ConnectFailure::LocalPorts);
        assert_eq!(word(Errno::MFILE), ConnectFailure::FdLimit);
        assert_eq!(word(Errno::NOBUFS), ConnectFailure::Memory);
        assert_eq!(word(Errno::NOSPC), ConnectFailure::Memory);
    }

    #[test]
    fn given_a_backend_that_says_no_to_clients_addresses_when_noted_then_it_is_counted_and_ejects_nobody() {
        let all = backends([SocketAddr::from((LOOPBACK, 1)), SocketAddr::from((LOOPBACK, 2))]);
        let web = balancer(&all);
        let options = ConnectOptions::default();

        for _ in 0..20 {
            let mut ladder = Ladder::new(&web, CLIENT, &options);
            let error = ConnectError::new(all[0].address(), Errno::CONNREFUSED.into());
            ladder.note(&all[0], &Missed::Denied(error)).expect("another try is of use");
            assert_eq!(ladder.verdict, DropReason::DeniedAddress);
        }

        assert_eq!(failures(&all[0], ConnectFailure::Refused), 20);
        assert!(!all[0].is_ejected(), "a policy may keep that client out alone");
    }

    #[test]
    fn given_a_client_that_is_denied_when_another_backend_fails_then_the_verdict_is_the_backends() {
        let all = backends([SocketAddr::from((LOOPBACK, 1)), SocketAddr::from((LOOPBACK, 2))]);
        let (web, options) = (balancer(&all), ConnectOptions::default());
        let refused = |backend: &Backend| ConnectError::new(backend.address(), Errno::CONNREFUSED.into());
        let mut ladder = Ladder::new(&web, CLIENT, &options);

        ladder.note(&all[0], &Missed::Denied(refused(&all[0]))).expect("another try is of use");
        ladder.note(&all[1], &Missed::Failed(refused(&all[1]))).expect("another try is of use");

        assert_eq!(ladder.next_backend().expect_err("no more"), DropReason::EjectedAll);
    }

    #[test]
    fn given_what_the_kernel_says_when_judged_then_what_the_network_refuses_is_told_from_what_this_host_does() {
        let judged = |errno: Errno| is_from_network(&errno.into());

        assert!(
            [Errno::CONNREFUSED, Errno::CONNRESET, Errno::HOSTUNREACH, Errno::NETUNREACH]
                .map(judged)
                .iter()
                .all(|is| *is)
        );
        let of_host = [Errno::PERM, Errno::ACCESS, Errno::INVAL, Errno::ADDRNOTAVAIL, Errno::ADDRINUSE].map(judged);
        assert_eq!(of_host, [false; 5]);
    }

    #[test]
    fn given_short_steps_when_a_client_is_to_be_seen_then_as_much_time_is_left_for_the_node() {
        let [web] = backends([SocketAddr::from((LOOPBACK, 1))]);
        let (of_one, options) = (balancer(std::slice::from_ref(&web)), steps(Duration::from_millis(100), 1));
        let ladder = Ladder::new(&of_one, CLIENT, &options);

        assert!(ladder.patience_for_proof(&web) <= Duration::from_millis(50));
    }

    /// T168: one backend after the other without a source port is no fault of theirs, and is told as it is.
    #[test]
    fn t168_given_no_source_port_to_any_backend_when_noted_then_the_verdict_says_so() {
        let all = backends([SocketAddr::from((LOOPBACK, 1)), SocketAddr::from((LOOPBACK, 2))]);
        let web = balancer(&all);
        let options = ConnectOptions::default();
        let mut ladder = Ladder::new(&web, CLIENT, &options);

        for _ in 0..2 {
            let backend = ladder.next_backend().expect("one more");
            let error = ConnectError::new(backend.address(), Errno::ADDRNOTAVAIL.into());
            ladder.note(&backend, &Missed::Failed(error)).expect("another try is of use");
        }

        assert_eq!(ladder.next_backend().expect_err("no more"), DropReason::LocalPorts);
        assert!(all.iter().all(|backend| failures(backend, ConnectFailure::LocalPorts) == 1));
    }
}
