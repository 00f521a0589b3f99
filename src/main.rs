//! The program: arguments, logs, runtime, exit code. What the commands do lives in the library.

use std::future::{Future, pending};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::available_parallelism;

use anyhow::{Context, anyhow};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use kube_relay::admin::{self, AdminOptions};
use kube_relay::cli::{
    CheckArgs, CheckOutput, Cli, Command, ConfigError, EXIT_FINE, EXIT_PROBLEMS, EXIT_USAGE, NewCommand,
    NewServiceArgs, RunArgs, StatusArgs, StatusOutput,
};
use kube_relay::config::{CheckConfig, RunConfig};
use kube_relay::host::{self, Host};
use kube_relay::lifecycle::{self, LISTENERS, Readiness, Request, SOURCE, ShutdownTimes, Signals};
use kube_relay::status::Status;
use kube_relay::{logs, overview, peer};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

// The relay and its source are written beside this file: their stand-ins have the same calls.
use stand_in::{Relay, manifest, report_of, service_manifest};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let outcome = match cli.command {
        Command::Run(args) => run(*args),
        Command::Check(args) => check(*args),
        Command::Status(args) => status(&args),
        Command::New(NewCommand::Service(args)) => new_service(args),
    };
    match outcome {
        Ok(code) => code.into(),
        Err(error) => match error.downcast::<ConfigError>() {
            Ok(error) => usage(&Cli::command().error(ErrorKind::ValueValidation, error)),
            Err(error) => {
                eprintln!("kube-relay: {error:#}");
                EXIT_PROBLEMS.into()
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
    let config = RunConfig::try_from(args)?;
    logs::start(&config.logs);
    let workers = config.workers.unwrap_or_else(available_parallelism_or_one);
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(workers).thread_name("relay").enable_all().build();
    let outcome = on(runtime.context("cannot start the runtime")?, serve(config, workers));
    Ok(match outcome {
        Ok(()) => EXIT_FINE,
        Err(error) => {
            error!("{error:#}");
            EXIT_PROBLEMS
        }
    })
}

/// Honours CPU affinity and cgroup quotas.
fn available_parallelism_or_one() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// From the first listener to the last connection.
async fn serve(config: RunConfig, workers: usize) -> anyhow::Result<()> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let open_files = raise_open_files();
    let host = read_host().await;
    info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), workers, open_files, "starting");

    let readiness = Readiness::blocked_by(&[SOURCE, LISTENERS]);
    let relay = Relay::start(config.plan.resolve(&host)).await.context("cannot start the relay")?;
    let admin = admin::start(admin_options(&config, &host), relay.status(), readiness.clone()).await?;
    for (surface, address) in admin.bound() {
        debug!(listen = %address, paths = ?surface.paths(), "admin server listens");
    }
    let watching = tokio::spawn(lifecycle::watch_start(relay.status(), readiness.clone()));

    let (reload, stop) = (Arc::new(Notify::new()), CancellationToken::new());
    let source = manifest::run(config.sources, relay.messages(), Arc::clone(&reload), stop.clone());
    let source = tokio::spawn(source);
    let times = tokio::select! {
        times = end(&mut signals, &reload, config.shutdown) => times,
        error = false_start(source, relay.status()) => return Err(error),
    };
    // Until the last connection has ended, changes are followed and `/readyz` says what goes on.
    lifecycle::shut_down(&relay, &readiness, times, signals.stop()).await;
    watching.abort();
    stop.cancel();
    drop(admin);
    info!("stopped");
    Ok(())
}

/// Waits for a signal to end, and passes those to reload on.
async fn end(signals: &mut Signals, reload: &Notify, patient: ShutdownTimes) -> ShutdownTimes {
    loop {
        match signals.next().await {
            Request::Reload => reload.notify_one(),
            Request::Drain => return patient,
            Request::Stop => return ShutdownTimes::NONE,
        }
    }
}

/// Waits for a source that fails before anything is served. Whatever happens to it later, what is served stays.
async fn false_start(source: JoinHandle<io::Result<()>>, status: watch::Receiver<Arc<Status>>) -> anyhow::Error {
    let error = match source.await {
        // Standard input has been read: there is no more to come.
        Ok(Ok(())) => return pending().await,
        Ok(Err(error)) => anyhow!(error),
        Err(error) => anyhow!(error).context("the source failed"),
    };
    if status.borrow().synced {
        error!("{error:#}; what is served stays as it is");
        return pending().await;
    }
    error
}

fn admin_options(config: &RunConfig, host: &Host) -> AdminOptions {
    let each = |address: Option<_>| address.map(|address| host.expand_wildcard(address)).unwrap_or_default();
    AdminOptions {
        metrics: each(config.metrics_address),
        health: each(config.healthz_address),
        hard_fail: config.bind_address_hard_fail,
    }
}

fn raise_open_files() -> Option<u64> {
    host::raise_open_files().unwrap_or_else(|error| {
        warn!(%error, "the limit of open files stays as it is");
        None
    })
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
    let config = CheckConfig::try_from(args)?;
    let report = on(small_runtime()?, async { report_of(&config, &read_host().await).await })?;
    print(&match output {
        CheckOutput::Text => overview::describe(&report),
        CheckOutput::Json => serde_json::to_string_pretty(&report)? + "\n",
    })?;
    Ok(if report.problems.is_empty() { EXIT_FINE } else { EXIT_PROBLEMS })
}

fn status(args: &StatusArgs) -> anyhow::Result<u8> {
    let mut live = on(small_runtime()?, peer::status(args.server))?;
    if let Some(name) = &args.service {
        let report = std::mem::take(&mut live.report).only(name);
        live.report = report.with_context(|| format!("{}: there is no Service {name}", args.server))?;
    }
    print(&match args.output {
        StatusOutput::Json => serde_json::to_string_pretty(&live)? + "\n",
        StatusOutput::Yaml => serde_saphyr::to_string(&live)?,
        StatusOutput::Table if args.service.is_some() => overview::describe(&live.report),
        StatusOutput::Table => overview::table(&live),
    })?;
    Ok(EXIT_FINE)
}

fn new_service(args: NewServiceArgs) -> anyhow::Result<u8> {
    print(&service_manifest(&args.checked()?)?)?;
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

/// To standard output. Who stops reading early (`| head`) has what he wants.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

/// The calls of `control::Relay`, `manifest` and `scaffold`, until those are there.
mod stand_in {
    use std::sync::Arc;
    use std::time::Duration;

    use kube_relay::cli::NewServiceArgs;
    use kube_relay::config::CheckConfig;
    use kube_relay::control::Message;
    use kube_relay::host::Host;
    use kube_relay::lifecycle::Drainable;
    use kube_relay::plan::PlanOptions;
    use kube_relay::status::{Report, Status};
    use tokio::sync::{mpsc, watch};

    pub(crate) struct Relay {
        status: watch::Receiver<Arc<Status>>,
        messages: mpsc::Sender<Message>,
    }

    impl Relay {
        pub(crate) async fn start(_plan: PlanOptions) -> std::io::Result<Self> {
            let (messages, mut inbox) = mpsc::channel(64);
            let (sender, status) = watch::channel(Arc::new(Status::default()));
            tokio::spawn(async move {
                while let Some(message) = inbox.recv().await {
                    sender.send_modify(|status| {
                        let status = Arc::make_mut(status);
                        match message {
                            Message::Event(_) => status.revision += 1,
                            Message::Synced => status.synced = true,
                            Message::Source { status: source, .. } => status.source = source,
                        }
                    });
                }
            });
            Ok(Self { status, messages })
        }

        pub(crate) fn status(&self) -> watch::Receiver<Arc<Status>> {
            self.status.clone()
        }

        pub(crate) fn messages(&self) -> mpsc::Sender<Message> {
            self.messages.clone()
        }
    }

    impl Drainable for Relay {
        async fn stop_accepting(&self) {}

        async fn drain(&self, _timeout: Duration) -> usize {
            0
        }
    }

    pub(crate) mod manifest {
        use std::path::PathBuf;
        use std::sync::Arc;

        use kube_relay::control::Message;
        use kube_relay::status::SourceStatus;
        use tokio::sync::{Notify, mpsc};
        use tokio_util::sync::CancellationToken;

        pub(crate) async fn run(
            sources: Vec<PathBuf>,
            messages: mpsc::Sender<Message>,
            reload: Arc<Notify>,
            stop: CancellationToken,
        ) -> std::io::Result<()> {
            for source in sources.iter().filter(|source| source.as_os_str() != "-") {
                source.metadata().map_err(|error| std::io::Error::other(format!("{}: {error}", source.display())))?;
            }
            let mut status = SourceStatus { kind: "static".into(), last_reload_successful: true, config_revision: 0 };
            while !stop.is_cancelled() {
                status.config_revision += 1;
                let _ = messages.send(Message::Source { status: status.clone(), problems: vec![] }).await;
                let _ = messages.send(Message::Synced).await;
                tokio::select! {
                    () = reload.notified() => {}
                    () = stop.cancelled() => {}
                }
            }
            Ok(())
        }
    }

    pub(crate) async fn report_of(_config: &CheckConfig, _host: &Host) -> anyhow::Result<Report> {
        Ok(Report::default())
    }

    pub(crate) fn service_manifest(args: &NewServiceArgs) -> anyhow::Result<String> {
        anyhow::bail!("no manifest of Service {} yet", args.name)
    }
}
