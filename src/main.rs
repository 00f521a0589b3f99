//! The program: arguments, logs, runtime, exit code. What the commands do lives in the library.

use std::collections::BTreeSet;
use std::env;
use std::future::{Future, pending};
use std::io::{self, IsTerminal, Write};
use std::mem;
use std::net::SocketAddr;
use std::path::{self, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use clap::error::ErrorKind;
#[cfg(feature = "kubernetes")]
use ipnet::IpNet;
use kube_relay::access_log::AccessLog;
use kube_relay::admin::{self, AdminOptions, Unbound};
#[cfg(feature = "kubernetes")]
use kube_relay::api_client::Api;
use kube_relay::cleanup::{Removed, remove_routes};
use kube_relay::cli::{
    CheckArgs, CheckOutput, CleanupArgs, Command, CompletionsArgs, ConfigError, DiffArgs, DoctorArgs, DoctorOutput,
    EXIT_FINE, EXIT_PROBLEMS, EXIT_USAGE, EnvArgs, ExplainArgs, ManArgs, NewCommand, NewServiceArgs, ReadyArgs,
    RunArgs, StatusArgs, StatusOutput, TopArgs, UpgradeArgs,
};
use kube_relay::config::{CheckConfig, RunConfig, SourceConfig};
use kube_relay::config_file::ConfigFile;
use kube_relay::control::{Relay, RelayOptions};
use kube_relay::difference::difference;
use kube_relay::discovery::{Discovery, DiscoveryConfig, DiscoverySource};
use kube_relay::doctor::{DoctorConfig, examine};
use kube_relay::elder::Descendants;
use kube_relay::explain::{Explanation, explain};
use kube_relay::flag_defaults::{self, StartError};
use kube_relay::given::Given;
use kube_relay::handover::{
    self, Arrival, Decision, Handed, Host as SuccessionHost, NoDoor, Office, TakeError, TakeOver, UpgradeReport,
};
use kube_relay::heap;
use kube_relay::host::{self, Host, node_port_advice};
use kube_relay::host_watch::Hosts;
#[cfg(feature = "kubernetes")]
use kube_relay::kubernetes;
use kube_relay::lifecycle::{self, LISTENERS, Readiness, Request, SOURCE, ShutdownTimes, Signals};
use kube_relay::live::LiveReport;
use kube_relay::manifest::{self, Input, Source};
use kube_relay::model::{Event, Model};
use kube_relay::place::{self, Place};
use kube_relay::plan::{Plan, PlanOptions, Severity};
use kube_relay::retirement::Retirement;
use kube_relay::scaffold::new_service_yaml;
use kube_relay::state_lock::{Holder, StateLock, StateLockError};
use kube_relay::status::Report;
use kube_relay::supervisor::{self, News};
use kube_relay::{logs, manual, overview, panics, peer, printable, top};
use serde::Serialize;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// How long those may take who have asked our own servers when another process answers there from now on.
const OWN_ANSWERS_LIMIT: Duration = Duration::from_secs(1);

/// Threads for everything but traffic, which has its own: one may be planning while another answers.
const CONTROL_THREADS: usize = 2;

/// How often it is looked whether a state folder is to be had that another process has.
const FOLDER_RETRY: Duration = Duration::from_millis(500);

/// Descriptors that are made room for at the start, in half a megabyte of the kernel: enough for 10,000 Services of a TCP
/// and a UDP port each and 20,000 connections.
const OPEN_FILES_EXPECTED: u64 = 65_536;

fn main() -> ExitCode {
    let cli = match flag_defaults::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(StartError::Usage(error)) => return usage(&error),
        Err(StartError::File { failure, source }) => {
            eprintln!("{source}");
            return failure.into();
        }
    };
    let failure = cli.command.failure();
    let outcome = match cli.command {
        Command::Run(args) => run(*args),
        Command::Check(args) => check(*args),
        Command::Status(args) => status(&args),
        Command::Explain(args) => explained(*args),
        Command::Diff(args) => diff(*args),
        Command::Top(args) => top(&args),
        Command::Doctor(args) => doctor(*args),
        Command::Env(args) => discover(args),
        Command::Upgrade(args) => upgrade(args),
        Command::Ready(args) => ready(&args),
        Command::Cleanup(args) => cleanup(&args),
        Command::New(NewCommand::Service(args)) => new_service(args),
        Command::Completions(args) => completions(&args),
        Command::Man(args) => man(&args),
    };
    match outcome {
        Ok(code) => code.into(),
        Err(error) => match error.downcast::<ConfigError>() {
            Ok(error) => {
                // As clap says it, but without the usage of another command.
                eprintln!("error: {error}\n\nFor more information, try '--help'.");
                EXIT_USAGE.into()
            }
            Err(error) => {
                eprint!("{}", printable::lines(&format!("kube-relay: {error:#}\n")));
                failure.into()
            }
        },
    }
}

/// Help and version are answers; everything else that clap says is a wrong command line.
fn usage(error: &clap::Error) -> ExitCode {
    // Where standard error is closed, nobody is left to tell.
    let _ = error.print();
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if asked_for { EXIT_FINE.into() } else { EXIT_USAGE.into() }
}

fn run(args: RunArgs) -> anyhow::Result<u8> {
    let given = Given::take(); // Before anything is opened.
    heap::keep_little(); // Before there are other threads.
    let file = args.config_file().cloned();
    let config = RunConfig::try_from(args)?;
    all_there(&config.source)?;
    let open_files = host::raise_open_files();
    host::make_room_for_open_files(OPEN_FILES_EXPECTED); // Before there are other threads, as that of the log.
    let _last_words = logs::start(&config.logs).context("cannot start the log")?;
    panics::log_and_count();
    file.iter().for_each(tell_of_file);
    let open_files = open_files.unwrap_or_else(|error| {
        warn!(%error, "the limit of open files stays as it is");
        None
    });
    let workers = config.workers.unwrap_or_else(available_parallelism_or_one);
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(CONTROL_THREADS).thread_name("control").enable_all().build();
    let outcome = runtime.context("cannot start the runtime");
    let outcome = outcome.and_then(|runtime| on(runtime, serve(config, given, workers, open_files)));
    Ok(match outcome {
        Ok(()) => EXIT_FINE,
        Err(error) => {
            match error.downcast_ref::<TakeError>() {
                Some(failure) => error!(reason = %failure.reason(), "{error:#}"),
                None => error!("{error:#}"),
            }
            EXIT_PROBLEMS
        }
    })
}

/// A name that leads nowhere is a slip, not a source that is empty for now.
fn all_there(source: &SourceConfig) -> anyhow::Result<()> {
    match source {
        SourceConfig::Manifests(inputs) => match inputs.iter().find_map(Input::missing) {
            Some(missing) => bail!("{}: no such file or folder", missing.display()),
            None => Ok(()),
        },
        #[cfg(feature = "kubernetes")]
        SourceConfig::Api { .. } => Ok(()),
    }
}

/// How this process comes to its state folder.
enum StateDir {
    /// There is none, or it is of no use for that.
    None,
    /// It is ours until all has ended that may write there.
    Own(PathBuf, StateLock),
    /// It will be.
    TakeOver(TakeOver),
}

/// What was begun with a state folder.
enum Begun {
    Alone(StateDir),
    InPlaceOf(oneshot::Receiver<Result<Office, TakeError>>, Decision),
}

/// Where another process has the folder and is to be taken over from, it is waited for until it can be, or ends.
async fn state_dir(config: &RunConfig) -> anyhow::Result<StateDir> {
    let Some(folder) = config.state_dir.clone() else { return Ok(StateDir::None) };
    if !config.take_over {
        return Ok(lock_state_dir(config)?.map_or(StateDir::None, |lock| StateDir::Own(folder, lock)));
    }
    let take_over = TakeOver {
        folder: folder.clone(),
        holder: holder(config),
        pod: config.pod_uid.clone(),
        decision: Decision::default(),
    };
    let mut told = String::new();
    loop {
        let arriving = take_over.clone();
        let arrival = spawn_blocking(move || arriving.arrive()).await.context("nobody has looked at --state-dir")??;
        match arrival {
            Arrival::First(lock) => {
                info!("nobody is there to take over from");
                return Ok(StateDir::Own(folder, lock));
            }
            Arrival::Successor => {
                info!("another kube-relay serves: it is taken over from once there is a plan");
                return Ok(StateDir::TakeOver(take_over));
            }
            Arrival::Alone(error) => {
                warn!("{:#}", anyhow!(error));
                return Ok(StateDir::None);
            }
            Arrival::NotYet(why) => {
                let why = why.to_string();
                if told != why {
                    info!("{why}");
                    told = why;
                }
                sleep(FOLDER_RETRY).await;
            }
        }
    }
}

fn holder(config: &RunConfig) -> Holder {
    let admin = config.status_address.or(config.metrics_address);
    Holder { pid: std::process::id(), admin, since: SystemTime::now() }
}

/// Refuses to start where another process has the folder. One that cannot be locked cannot be written as a rule, and
/// Services are served without it.
fn lock_state_dir(config: &RunConfig) -> anyhow::Result<Option<StateLock>> {
    let Some(folder) = &config.state_dir else { return Ok(None) };
    match StateLock::take(folder, holder(config)) {
        Ok(lock) => Ok(Some(lock)),
        Err(error @ StateLockError::Held { .. }) => Err(error.into()),
        Err(error) => {
            warn!("{:#}", anyhow!(error));
            Ok(None)
        }
    }
}

/// All that is ignored in one line: each field with its place and reason is for `check`.
fn tell_of_file(file: &ConfigFile) {
    let (config, kind) = (&file.path, file.kind);
    if file.ignored.is_empty() {
        return info!(config, kind, "configuration taken");
    }
    let ignored = file.ignored.join(", ");
    info!(config, kind, ignored, "configuration taken; `kube-relay check --config` tells more of what is ignored");
}

/// Honours CPU affinity and the CPU quota of the cgroup, of either version; a part of a CPU does not count, but one is
/// the least.
fn available_parallelism_or_one() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// From the first listener to the last connection, and to the last line of the access log, however it ends.
async fn serve(config: RunConfig, given: Given, workers: usize, open_files: Option<u64>) -> anyhow::Result<()> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let nothing_read = Notify::new();
    let folder = tokio::select! {
        biased;
        folder = state_dir(&config) => folder?,
        _ = end(&mut signals, &config, &nothing_read, None) => return Ok(()), // It has waited for another one.
    };
    let access_log = config.access_log.as_ref().map(AccessLog::start).transpose()?;
    let outcome = relay(config, folder, given, workers, open_files, access_log.as_ref(), &mut signals).await;
    if let Some(access_log) = access_log {
        access_log.end().await;
    }
    if let Some(after) = outcome? {
        let ending = after.outlast(&mut signals).await;
        if !ending.is_success() {
            bail!("the process that has taken over has ended: {ending}");
        }
    }
    info!("stopped");
    Ok(())
}

/// From the first listener to the last connection. Those for which this process has to stay after that, if any.
async fn relay(
    mut config: RunConfig,
    folder: StateDir,
    given: Given,
    workers: usize,
    open_files: Option<u64>,
    access_log: Option<&AccessLog>,
    signals: &mut Signals,
) -> anyhow::Result<Option<Descendants>> {
    let hosts = Hosts::follow().await;
    if config.source.is_cluster() {
        config.plan.node.name.get_or_insert_with(|| host::name().into());
    }
    info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), workers, open_files, "starting");

    let place = Place { plan: config.plan.clone(), hosts };
    advise_on_node_ports(&place);
    let readiness = Readiness::blocked_by(&[SOURCE, LISTENERS]);
    let host = place.hosts.now();
    let mut options = config.relay_options(&host);
    options.access_log = access_log.map(AccessLog::tap);
    let (relay, begun) = start_relay(options, folder, given).context("cannot start the relay")?;
    let own_servers = OwnServers::of(&config);
    let answers = match begun {
        Begun::Alone(_) => own_servers.on(&host),
        Begun::InPlaceOf(..) => AdminOptions::nowhere(), // Another process does.
    };
    let mut admin = admin::start(answers, relay.status(), readiness.clone(), relay.health()).await?;
    for (surface, address) in admin.bound() {
        debug!(listen = %address, paths = ?surface.paths(), "admin server listens");
    }
    let watching = tokio::spawn(lifecycle::watch_start(relay.status(), readiness.clone()));

    let (reload, stop) = (Arc::new(Notify::new()), CancellationToken::new());
    let folder_taken = matches!(begun, Begun::InPlaceOf(..)).then(CancellationToken::new);
    let mut source =
        follow(&config, place.clone(), &relay, admin.unbound(), folder_taken.clone(), &reload, &stop).await?;
    let mut asked = None;
    let (office, _lock) = match begun {
        Begun::Alone(folder) => found(folder),
        Begun::InPlaceOf(mut office, decision) => {
            let office = tokio::select! {
                biased;
                office = &mut office => office,
                times = end(signals, &config, &reload, access_log) => {
                    if decision.leave() {
                        return Ok(None); // Nobody has come here yet, and nothing is left.
                    }
                    asked = Some(times);
                    office.await
                }
                () = panicked(&mut source) => bail!("the source task has panicked, nothing was taken over"),
            };
            let mut office = office.context("the control task has panicked, nothing was taken over")??;
            admin.take_over(office.take_admin_sockets(), &own_servers.on(&place.hosts.now())).await;
            office.tell_serving();
            folder_taken.iter().for_each(CancellationToken::cancel);
            (Some(office), None)
        }
    };
    if office.is_some() {
        enter_line(&config);
    }
    let handed = office.map(|office| {
        let host = SuccessionHost {
            office,
            folder: config.state_dir.clone().unwrap_or_default(),
            admin: admin.sockets(),
            readiness: readiness.clone(),
            cannot_start: cannot_start(&config.source),
            pod: config.pod_uid.clone(),
        };
        relay.attend(host)
    });
    let mut handed = pin!(all_handed(handed.transpose().context("cannot start a thread")?));
    let telling = tokio::spawn({
        let readiness = readiness.clone();
        async move {
            readiness.ready().await;
            // Elsewhere: as long as many sockets are being kept, it may have to wait.
            let _ = tokio::task::spawn_blocking(|| supervisor::tell(News::Ready)).await;
        }
    });
    let closing = admin.closing();
    let mut admin = tokio::spawn(admin.follow(place.hosts, move |host| own_servers.on(host)));
    let folder = config.state_dir.clone().unwrap_or_default();
    let retirement =
        |times| Retirement { relay: &relay, readiness: &readiness, access_log, times, folder: folder.as_path() };
    let times = tokio::select! {
        times = until_asked(asked, end(signals, &config, &reload, access_log)) => times,
        // Whoever supervises this process starts another one, which serves.
        () = relay.ended() => bail!("the control task has panicked, nothing is served any more"),
        () = panicked(&mut source) => bail!("the source task has panicked, no change is followed any more"),
        mut handed = &mut handed => {
            let answered = handed.answered();
            watching.abort();
            closing.cancel();
            let _ = timeout(OWN_ANSWERS_LIMIT, &mut admin).await; // Who has asked here is answered here.
            admin.abort();
            handed.look_away();
            stop.cancel();
            relay.leave_guard().await;
            let after = retirement(config.shutdown).run(handed, signals).await;
            answered.await;
            return after.map_err(|ending| anyhow!("the process that has taken over has ended: {ending}"));
        }
    };
    telling.abort();
    supervisor::tell(News::Stopping);
    let after = tokio::select! {
        biased;
        // The pod that comes in the place of this one has not waited for its end.
        mut handed = &mut handed => {
            let answered = handed.answered();
            closing.cancel();
            let _ = timeout(OWN_ANSWERS_LIMIT, &mut admin).await;
            handed.look_away();
            stop.cancel();
            relay.leave_guard().await;
            let after = retirement(times).run_asked(handed, signals).await;
            answered.await;
            after
        }
        // Until the last connection has ended, changes are followed and `/readyz` says what goes on.
        _ = lifecycle::shut_down(&relay, &readiness, times, hurry(signals, access_log)) => {
            relay.leave_addresses().await;
            None
        }
    };
    watching.abort();
    stop.cancel();
    admin.abort();
    Ok(after)
}

/// Notes that this pod serves now: no pod that has served before it takes its place back.
fn enter_line(config: &RunConfig) {
    let (Some(folder), Some(pod)) = (&config.state_dir, &config.pod_uid) else { return };
    if let Err(error) = handover::enter(folder, pod) {
        warn!(state_dir = %folder.display(), %error, "it cannot be noted that this pod serves: an older one that is started again takes over");
    }
}

/// Resolves when a task has panicked. One that has ended otherwise is nobody's trouble.
async fn panicked(task: &mut JoinHandle<()>) {
    match task.await {
        Err(error) if error.is_panic() => {}
        _ => pending().await,
    }
}

fn start_relay(options: RelayOptions, folder: StateDir, given: Given) -> io::Result<(Relay, Begun)> {
    Ok(match folder {
        StateDir::TakeOver(take_over) => {
            let decision = take_over.decision.clone();
            let (relay, told) = Relay::start_taking_over(options, take_over, given)?;
            (relay, Begun::InPlaceOf(told, decision))
        }
        folder => (Relay::start_given(options, given)?, Begun::Alone(folder)),
    })
}

/// Lets others take over from this process, where it has a folder to meet them in. Where that cannot be: the folder's lock.
fn found(folder: StateDir) -> (Option<Office>, Option<StateLock>) {
    let StateDir::Own(folder, lock) = folder else { return (None, None) };
    match Office::found(&folder, lock) {
        Ok(office) => (Some(office), None),
        Err(NoDoor { lock, source }) => {
            warn!(state_dir = %folder.display(), error = %source, "no hot upgrade: no socket can be made there");
            (None, Some(lock))
        }
    }
}

/// Resolves when another process serves.
async fn all_handed(handed: Option<oneshot::Receiver<Handed>>) -> Handed {
    match handed {
        Some(handed) => match handed.await {
            Ok(handed) => handed,
            Err(_) => pending().await, // Its thread has panicked: nobody can take over, and all is served.
        },
        None => pending().await,
    }
}

/// Why this process could not be started again.
fn cannot_start(source: &SourceConfig) -> Option<&'static str> {
    match source {
        SourceConfig::Manifests(inputs) if inputs.iter().any(|input| matches!(input, Input::Stdin)) => {
            Some("its manifests came from standard input, which another process cannot read again: use files")
        }
        _ => None,
    }
}

/// Starts the source.
async fn follow(
    config: &RunConfig,
    place: Place,
    relay: &Relay,
    #[cfg_attr(not(feature = "kubernetes"), expect(unused_variables))] unbound: watch::Receiver<Vec<Unbound>>,
    #[cfg_attr(not(feature = "kubernetes"), expect(unused_variables))] folder_taken: Option<CancellationToken>,
    reload: &Arc<Notify>,
    stop: &CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    let stop = stop.clone();
    Ok(match &config.source {
        SourceConfig::Manifests(inputs) => {
            let source = Source::new(inputs.clone(), config.plan.ranges());
            tokio::spawn(place::follow(place, relay.messages(), stop.clone()));
            tokio::spawn(manifest::run(source, relay.messages(), Arc::clone(reload), stop))
        }
        #[cfg(feature = "kubernetes")]
        SourceConfig::Api { server, service_host } => {
            let selection = kubernetes::Selection {
                proxy_name: config.plan.proxy_name.clone(),
                state_dir: config.state_dir.clone(),
                folder_taken,
                node_name: config.plan.node.name.clone().unwrap_or_default(),
                service_nets: service_host
                    .map(IpNet::from)
                    .into_iter()
                    .chain(config.plan.service_cluster_ip_range)
                    .collect(),
                ..kubernetes::Selection::default()
            };
            kubernetes::start(&Api::find(server).await?, &selection, relay, place, unbound, stop)?
        }
    })
}

/// What somebody has asked for already, or will.
async fn until_asked(asked: Option<ShutdownTimes>, end: impl Future<Output = ShutdownTimes>) -> ShutdownTimes {
    match asked {
        Some(times) => times,
        None => end.await,
    }
}

/// Waits for a signal to end, and passes those to reload on.
async fn end(
    signals: &mut Signals,
    config: &RunConfig,
    reload: &Notify,
    access_log: Option<&AccessLog>,
) -> ShutdownTimes {
    loop {
        let request = signals.next().await;
        if let (Request::Reload, Some(access_log)) = (request, access_log) {
            access_log.reopen();
        }
        match request {
            // Changes come by themselves there, and so do credentials (`login`).
            Request::Reload if config.source.is_cluster() => {
                info!(
                    "SIGHUP changes nothing but the access log's file: the API server is followed all the time, and \
                     files are read as they change"
                );
            }
            Request::Reload => {
                info!("reading the manifests again");
                reload.notify_one();
            }
            Request::Drain => return config.shutdown,
            Request::Stop => return ShutdownTimes::NONE,
        }
    }
}

/// Waits for a signal to end now. A drain may take long: the access log's file may be moved away meanwhile.
async fn hurry(signals: &mut Signals, access_log: Option<&AccessLog>) {
    loop {
        match (signals.next().await, access_log) {
            (Request::Stop, _) => return,
            (Request::Reload, Some(access_log)) => access_log.reopen(),
            (Request::Reload | Request::Drain, _) => {}
        }
    }
}

/// Where our own servers answer, wherever this machine is.
struct OwnServers {
    metrics: Option<SocketAddr>,
    status: Option<SocketAddr>,
    health: Option<SocketAddr>,
    hard_fail: bool,
}

impl OwnServers {
    fn of(config: &RunConfig) -> Self {
        Self {
            metrics: config.metrics_address,
            status: config.status_address,
            health: config.healthz_address,
            hard_fail: config.bind_address_hard_fail,
        }
    }

    /// The same on a machine: a wildcard is each of its addresses.
    fn on(&self, host: &Host) -> AdminOptions {
        let each = |address: Option<_>| address.map(|address| host.expand_wildcard(address)).unwrap_or_default();
        AdminOptions {
            metrics: each(self.metrics),
            status: each(self.status),
            health: each(self.health),
            hard_fail: self.hard_fail,
        }
    }
}

/// What somebody who chose addresses for node ports may not have meant.
fn advise_on_node_ports(Place { plan, hosts }: &Place) {
    for advice in node_port_advice(&plan.node_port_addresses, &hosts.now(), &plan.node_addresses) {
        let selectors: Vec<_> = plan.node_port_addresses.iter().map(ToString::to_string).collect();
        info!(nodeport_addresses = selectors.join(","), "{advice}");
    }
}

async fn read_host() -> Host {
    Host::read().await.unwrap_or_else(|error| {
        let error = format!("{:#}", anyhow!(error));
        warn!(
            error,
            "this machine's addresses are unknown: node ports are served on 127.0.0.1 and --node-address only"
        );
        Host::loopback_only()
    })
}

fn check(args: CheckArgs) -> anyhow::Result<u8> {
    let output = args.output;
    let of_file = args.config_file().map(|file| file.findings.clone()).unwrap_or_default();
    let config = CheckConfig::try_from(args)?;
    let host = on(small_runtime()?, read_host());
    let mut report = plan_of(config, &host);
    let (notes, problems): (Vec<_>, Vec<_>) = of_file.into_iter().partition(|found| found.severity == Severity::Note);
    report.problems.splice(0..0, problems);
    report.notes.splice(0..0, notes);
    match output {
        CheckOutput::Text => show(&format!("{report}\n"))?,
        CheckOutput::Json => print_json(&report)?,
    }
    Ok(if report.problems.is_empty() { EXIT_FINE } else { EXIT_PROBLEMS })
}

/// The plan for manifests, as `run` would make it on this machine.
fn plan_of(config: CheckConfig, host: &Host) -> Report {
    Planned::of(config, host).report
}

/// The same, with what it was made from.
struct Planned {
    options: PlanOptions,
    model: Model,
    plan: Plan,
    report: Report,
    /// False where an object, or a part of one, could not be read.
    is_whole: bool,
}

impl Planned {
    fn of(config: CheckConfig, host: &Host) -> Self {
        let (options, ranges) = (config.plan.resolve(host), config.plan.ranges());
        let mut reading = manifest::read(config.sources, ranges);
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), BTreeSet::new());
        let (objects, found) = (mem::take(&mut reading.objects), mem::take(&mut reading.problems));
        let is_whole = found.iter().all(|problem| problem.severity < Severity::Error);
        model.apply(Event::Replace(objects), &mut dirty);
        plan.update(&model, &dirty, &options);
        let mut report = Report::of(&model, &plan, found);
        report.problems.iter_mut().chain(&mut report.notes).for_each(|problem| reading.locate(problem));
        Self { options, model, plan, report, is_whole }
    }

    /// With why each backend is one.
    fn explained(self) -> Report {
        let Self { options, model, plan, report, .. } = self;
        report.explained(&model, &plan, &options)
    }
}

fn status(args: &StatusArgs) -> anyhow::Result<u8> {
    let server = args.server.address;
    let live = on(small_runtime()?, async {
        match &args.service {
            Some(name) => peer::status_of(server, name).await,
            None => peer::status(server).await,
        }
    })?;
    match args.output {
        StatusOutput::Json => print_json(&live)?,
        StatusOutput::Yaml => show(&serde_saphyr::to_string(&live)?)?,
        StatusOutput::Table | StatusOutput::Wide if args.service.is_some() => {
            show(&(overview::describe(&live.report) + &overview::events(&live.recent)))?;
        }
        StatusOutput::Table => show(&overview::table(&live))?,
        StatusOutput::Wide => show(&overview::wide(&live))?,
    }
    Ok(EXIT_FINE)
}

fn explained(args: ExplainArgs) -> anyhow::Result<u8> {
    let (question, server) = (args.question(), args.server.address);
    let (report, inside) = match args.manifests()? {
        Some(config) => {
            let host = on(small_runtime()?, read_host());
            let inside = config.plan.inside(&host);
            let report = Planned::of(config, &host).explained();
            report.problems.iter().for_each(|problem| eprintln!("{problem}"));
            (report, inside)
        }
        None => {
            let live = synced(server, on(small_runtime()?, peer::status_for(server, question.from))?)?;
            (live.report, live.inside)
        }
    };
    let explanations = explain(&report, &inside, &question)?;
    let texts: Vec<_> = explanations.iter().map(ToString::to_string).collect();
    show(&texts.join("\n"))?;
    Ok(if explanations.iter().any(Explanation::is_served) { EXIT_FINE } else { EXIT_PROBLEMS })
}

/// Before its first complete state a relay has not even begun to serve.
fn synced(server: SocketAddr, live: LiveReport) -> anyhow::Result<LiveReport> {
    if !live.synced {
        bail!("{server}: its source has not delivered its first complete state yet; ask again soon");
    }
    Ok(live)
}

/// What cannot be read may well be no difference: then all is told, and that it may be wrong.
fn diff(args: DiffArgs) -> anyhow::Result<u8> {
    let server = args.server.address;
    let config = args.manifests()?;
    if let Some(missing) = config.sources.iter().find_map(Input::missing) {
        bail!("{}: no such file or folder", missing.display());
    }
    let (live, host) = on(small_runtime()?, async { (peer::status(server).await, read_host().await) });
    let live = synced(server, live?)?;
    let Planned { report: wanted, is_whole, .. } = Planned::of(config, &host);
    wanted.problems.iter().for_each(|problem| eprintln!("{problem}"));
    let difference = difference(&live.report, &wanted);
    show(&difference.to_string())?;
    if !is_whole {
        bail!("{server}: what would change is not certain, as manifests have errors");
    }
    Ok(if difference.is_empty() { EXIT_FINE } else { EXIT_PROBLEMS })
}

fn completions(args: &CompletionsArgs) -> anyhow::Result<u8> {
    print_bytes(&manual::completions(args.shell))?;
    Ok(EXIT_FINE)
}

fn man(args: &ManArgs) -> anyhow::Result<u8> {
    let page = manual::page(&args.command);
    print_bytes(&page.with_context(|| format!("there is no command {:?}", args.command.join(" ")))?)?;
    Ok(EXIT_FINE)
}

/// On a terminal the table moves, elsewhere it is text, and so it is on one that can only go on.
fn top(args: &TopArgs) -> anyhow::Result<u8> {
    let options = args.options();
    let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
    if args.once || is_dumb || !io::stdout().is_terminal() {
        show(&on(small_runtime()?, top::once(&options))?)?;
        return Ok(EXIT_FINE);
    }
    #[cfg(feature = "tui")]
    {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        on(runtime.context("cannot start the runtime")?, top::run(&options))?;
        Ok(EXIT_FINE)
    }
    #[cfg(not(feature = "tui"))]
    bail!("this build has no moving table (feature tui): ask with --once");
}

fn doctor(args: DoctorArgs) -> anyhow::Result<u8> {
    let output = args.output;
    let DoctorConfig { run, all } = args.checked()?;
    all_there(&run.source)?;
    let diagnosis = on(small_runtime()?, async {
        let planned = match &run.source {
            SourceConfig::Manifests(sources) if !sources.is_empty() => {
                let config = CheckConfig { sources: sources.clone(), plan: run.plan.clone() };
                Some(plan_of(config, &Host::read().await.unwrap_or_else(|_| Host::loopback_only())))
            }
            _ => None,
        };
        examine(&run, planned).await
    });
    match output {
        DoctorOutput::Text => show(&diagnosis.text(all))?,
        DoctorOutput::Json => print_json(&diagnosis)?,
    }
    Ok(if diagnosis.has_problems() { EXIT_PROBLEMS } else { EXIT_FINE })
}

fn discover(args: EnvArgs) -> anyhow::Result<u8> {
    let DiscoveryConfig { source, form } = args.checked()?;
    let Some(discovery) = discovery(source)? else { return Ok(EXIT_PROBLEMS) };
    let answer = discovery.answer(&form, seconds_since_1970());
    answer.gaps.iter().for_each(|gap| eprintln!("{gap}"));
    print(&answer.text)?;
    Ok(EXIT_FINE)
}

/// What there is to tell of. `None` where a manifest is wrong, which is said then.
fn discovery(source: DiscoverySource) -> anyhow::Result<Option<Discovery>> {
    match source {
        DiscoverySource::Manifests { inputs, ranges } => {
            let reading = manifest::read(inputs, ranges);
            let told = reading.problems.iter().filter(|problem| problem.severity > Severity::Note);
            told.for_each(|problem| eprintln!("{problem}"));
            let sound = reading.problems.iter().all(|problem| problem.severity < Severity::Error);
            Ok(sound.then(|| Discovery::of_manifests(&reading)))
        }
        DiscoverySource::Relay(server) => {
            let live = synced(server, on(small_runtime()?, peer::status(server))?)?;
            Ok(Some(Discovery::of_relay(&live.report)))
        }
    }
}

/// As the number of a zone's version, which is to grow. Good until 2106, as such numbers are; they go around then.
fn seconds_since_1970() -> u32 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (since.as_secs() & u64::from(u32::MAX)) as u32
}

fn upgrade(args: UpgradeArgs) -> anyhow::Result<u8> {
    let limit = args.timeout()?;
    let UpgradeReport { pid, version, listeners, streams, flows, elapsed_ms } =
        handover::upgrade(&args.state_dir, args.binary.map(absolute).transpose()?, limit)?;
    print(&format!(
        "pid {pid} serves now, kube-relay {version}: {listeners} listeners, {streams} connections and {flows} UDP flows \
         taken over in {elapsed_ms} ms\n"
    ))?;
    Ok(EXIT_FINE)
}

fn ready(args: &ReadyArgs) -> anyhow::Result<u8> {
    let here = handover::look(&args.state_dir)?;
    print(&format!("{here}\n"))?;
    Ok(if here.is_ready_in(args.pod_uid()) { EXIT_FINE } else { EXIT_PROBLEMS })
}

/// The running process has another working directory. A bare name is looked for where commands are.
fn absolute(program: PathBuf) -> anyhow::Result<PathBuf> {
    if program.components().count() == 1 && !program.exists() {
        return Ok(program);
    }
    path::absolute(&program).with_context(|| format!("{}: no such place", program.display()))
}

fn cleanup(args: &CleanupArgs) -> anyhow::Result<u8> {
    let protocol = args.route_protocol();
    let Removed { routes, reply_path } = on(small_runtime()?, remove_routes(protocol))?;
    print(&match routes {
        0 if reply_path => String::new(),
        0 => format!("nothing to remove: no local route has protocol {protocol}\n"),
        1 => format!("removed 1 route (protocol {protocol})\n"),
        count => format!("removed {count} routes (protocol {protocol})\n"),
    })?;
    if reply_path {
        print("removed what led answers to clients' addresses to a relay: rules, routes and a table of nf_tables\n")?;
    }
    Ok(EXIT_FINE)
}

fn new_service(args: NewServiceArgs) -> anyhow::Result<u8> {
    print(&new_service_yaml(&args.checked()?)?)?;
    Ok(EXIT_FINE)
}

/// Enough for a command that asks one thing.
fn small_runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

/// Runs to the end, and does not wait for what may block for ever, like a read of standard input.
fn on<T>(runtime: Runtime, future: impl Future<Output = T>) -> T {
    let outcome = runtime.block_on(future);
    runtime.shutdown_background();
    outcome
}

/// To standard output, for people: whatever others have written into names, it moves no cursor.
fn show(text: &str) -> anyhow::Result<()> {
    print(&printable::lines(text))
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&printable::json(&(serde_json::to_string_pretty(value)? + "\n")))
}

/// To standard output. Who stops reading early (`| head`) has what he wants.
fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}
