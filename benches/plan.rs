//! What ten thousand Services cost: from files to bound sockets, one endpoint's change, and a storm of changes.
//!
//! ```text
//! cargo bench --bench plan
//! ```
//!
//! Each line has its limit and whether it was kept; the program fails where one was not. Start-up is that of the real
//! program, in a process of its own; changes are followed in this process, where their CPU can be told from the rest.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube_relay::control::{Message, Relay, RelayOptions};
use kube_relay::host;
use kube_relay::model::{Endpoint, Event, Model, Objects, Service, Slice};
use kube_relay::plan::{Plan, PlanOptions, Step};
use kube_relay::serve::Listeners;
use kube_relay::serve::tcp::{TcpOptions, TcpShared};
use kube_relay::serve::udp::{UdpOptions, UdpShards};
use rustix::time::ClockId;
use tokio::runtime::Builder;
use tokio::time::sleep_until;

const SERVICES: u16 = 10_000;
const ENDPOINTS: u8 = 10;
/// Descriptors that are no listener.
const SPARE_DESCRIPTORS: u64 = 300;
const FILES: u16 = 10;
const PORT: u16 = 7600;
const STARTS: usize = 5;
const CHANGES: u16 = 1_000;
const STORM: u16 = 5_000;
const STORM_TIME: Duration = Duration::from_secs(1);

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<ExitCode> {
    let descriptors = host::raise_open_files()?.unwrap_or(u64::MAX);
    let count = SERVICES.min(descriptors.saturating_sub(SPARE_DESCRIPTORS).try_into().unwrap_or(SERVICES));
    println!("{count} Services of one TCP port, {ENDPOINTS} endpoints each; {descriptors} descriptors allowed");
    let mut report = Report { kept: true };
    start_up(count, &mut report)?;
    one_change(count, &mut report)?;
    storm(count, &mut report)?;
    Ok(ExitCode::from(u8::from(!report.kept)))
}

/// Prints figures beside their limits.
struct Report {
    kept: bool,
}

impl Report {
    /// One figure of several runs: the median counts, the spread is shown.
    fn figure(&mut self, what: &str, unit: &str, mut values: Vec<f64>, limit: f64) {
        values.sort_by(f64::total_cmp);
        let (median, least, most) = (values[values.len() / 2], values[0], values[values.len() - 1]);
        let kept = median <= limit;
        self.line(what, unit, [median, least, most], limit, kept);
    }

    /// A figure that has to be the same in each run: less would be as wrong as more.
    fn exactly(&mut self, what: &str, unit: &str, values: &[f64], wanted: f64) {
        let (least, most) =
            values.iter().fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(*value), most.max(*value)));
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        self.line(what, unit, [mean, least, most], wanted, least == wanted && most == wanted);
    }

    fn line(&mut self, what: &str, unit: &str, [median, least, most]: [f64; 3], limit: f64, kept: bool) {
        self.kept &= kept;
        println!(
            r#"{{"what": {what:?}, "unit": {unit:?}, "median": {median:.3}, "least": {least:.3}, "most": {most:.3}, "limit": {limit}, "kept": {kept}}}"#
        );
    }
}

/// From the start of the program to the moment when it says that all is bound.
fn start_up(count: u16, report: &mut Report) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    write_manifests(folder.path(), count)?;
    let (mut seconds, mut private, mut peak) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let began = Instant::now();
        let mut relay = Running::start(folder.path())?;
        relay.await_ready(count)?;
        seconds.push(began.elapsed().as_secs_f64());
        private.push(relay.memory_mb("RssAnon:")?);
        peak.push(relay.memory_mb("VmHWM:")?);
    }
    report.figure("from files to all bound", "s", seconds, 3.0);
    report.figure("private memory then", "MB", private, 200.0);
    report.figure("resident memory at most", "MB", peak, 200.0);
    Ok(())
}

/// The program, until it is dropped.
struct Running(Child);

impl Running {
    fn start(manifests: &Path) -> Outcome<Self> {
        let none = ["--metrics-bind-address", "127.0.0.1:0", "--healthz-bind-address", "127.0.0.1:0"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.args(["run", "--log-format", "json", "-f"]).arg(manifests).args(none);
        Ok(Self(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?))
    }

    fn await_ready(&mut self, services: u16) -> Outcome<()> {
        let log = self.0.stderr.take().ok_or("its log is read once")?;
        for line in BufReader::new(log).lines() {
            let entry: serde_json::Value = serde_json::from_str(&line?)?;
            if entry["message"] == "ready" {
                let whole = entry["services"] == services && entry["failed_listeners"] == 0;
                return if whole { Ok(()) } else { Err(format!("not all is served: {entry}").into()) };
            }
        }
        Err(format!("it ended: {}", self.0.wait()?).into())
    }

    fn memory_mb(&self, field: &str) -> Outcome<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).ok_or("procfs has no such field")?;
        let kib: f64 = line.trim_end_matches("kB").trim().parse()?;
        Ok(kib * 1024.0 / 1e6)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill(); // gone already: fine
        let _ = self.0.wait();
    }
}

/// What the control task does for one endpoint that leaves or comes, step by step: model, plan, swap.
fn one_change(count: u16, report: &mut Report) -> Outcome<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (mut plan_ms, mut swaps, mut steps_made) = (Vec::new(), Vec::new(), Vec::new());
    runtime.block_on(async {
        let options = PlanOptions { allow_loopback_endpoints: true, ..PlanOptions::default() };
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), BTreeSet::new());
        let udp = UdpShards::start(1, UdpOptions::default())?;
        let tcp = TcpShared::new(TcpOptions::default()).expect("threads");
        let mut listeners = Listeners::new(Arc::from([]), Arc::new(tcp), udp);
        model.apply(Event::Replace(objects(count)), &mut dirty);
        listeners.apply(plan.update(&model, &dirty, &options), Instant::now()).await;
        assert_eq!(listeners.bound_count(), usize::from(count));

        for change in 0..CHANGES {
            // Another number each time that a Service has its turn, so that each event changes something.
            let event = resized(change % count, ENDPOINTS - 1 - u8::from(change / count % 2 == 1));
            let began = cpu(ClockId::ThreadCPUTime);
            dirty.clear();
            model.apply(event, &mut dirty);
            let steps = plan.update(&model, &dirty, &options);
            swaps.push(steps.iter().filter(|step| matches!(step, Step::Swap(..))).count() as f64);
            steps_made.push(steps.len() as f64);
            listeners.apply(steps, Instant::now()).await;
            plan_ms.push((cpu(ClockId::ThreadCPUTime) - began).as_secs_f64() * 1e3);
        }
        listeners.close().await;
        Ok::<_, Box<dyn Error>>(())
    })?;
    report.figure("CPU to plan and swap one endpoint's change", "ms", plan_ms, 1.0);
    report.exactly("tables swapped by it", "tables", &swaps, 1.0);
    report.exactly("steps of any kind", "steps", &steps_made, 1.0);
    Ok(())
}

/// Five thousand slices change within a second, each of another Service, while the relay serves them all.
fn storm(count: u16, report: &mut Report) -> Outcome<()> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let plan = PlanOptions { allow_loopback_endpoints: true, ..PlanOptions::default() };
        let relay = Relay::start(RelayOptions { plan, ..RelayOptions::default() })?;
        let (messages, mut status) = (relay.messages(), relay.status());
        messages.send(Message::Event(Event::Replace(objects(count)))).await?;
        messages.send(Message::Synced).await?;
        status.wait_for(|status| status.synced).await?;
        let events: Vec<_> = (0..STORM).map(|number| resized(number % count, ENDPOINTS - 1)).collect();
        let last = events.last().map(|_| format!("default/s{:05}", (STORM - 1) % count)).ok_or("a storm of nothing")?;

        let (revision, cpu_before) = (status.borrow().revision, cpu(ClockId::ProcessCPUTime));
        let began = tokio::time::Instant::now();
        for (number, event) in (0..).zip(events) {
            sleep_until(began + STORM_TIME * number / u32::from(STORM)).await;
            messages.send(Message::Event(event)).await?;
        }
        let arrived = |service: &kube_relay::status::ServiceStatus| {
            service.ports.iter().all(|port| port.backends.len() == usize::from(ENDPOINTS - 1))
        };
        let last = kube_relay::name::ObjectName::parse(&last);
        status.wait_for(|status| status.services.get(&last).is_some_and(|service| arrived(service))).await?;
        let late = began.elapsed().saturating_sub(STORM_TIME);
        let spent = cpu(ClockId::ProcessCPUTime) - cpu_before;

        let batches = status.borrow().revision - revision;
        // A batch every 20 ms, and one at each end.
        report.figure("batches of 5,000 slice events in a second", "batches", vec![batches as f64], 52.0);
        report.figure("CPU of that second, sender included", "s", vec![spent.as_secs_f64()], 0.5);
        report.figure("the last one in use after", "ms", vec![late.as_secs_f64() * 1e3], 60.0);
        Ok::<_, Box<dyn Error>>(())
    })
}

fn cpu(clock: ClockId) -> Duration {
    let time = rustix::time::clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn objects(count: u16) -> Objects {
    let services: Vec<_> = (0..count).map(service).collect();
    let slices = (0..count).map(|number| slice(number, ENDPOINTS)).collect();
    Objects::new(services, slices)
}

fn service(number: u16) -> Service {
    Service::new(&format!("s{number:05}")).cluster_ip(cluster_ip(number)).port("http", PORT)
}

fn slice(number: u16, endpoints: u8) -> Slice {
    let service = service(number);
    let slice = Slice::new(&format!("{}-1", service.name.name), &service).port("http", 8000);
    (0..endpoints).fold(slice, |slice, host| slice.endpoint(Endpoint::new(pod(number, host))))
}

/// The same Service's slice with another number of endpoints.
fn resized(number: u16, endpoints: u8) -> Event {
    Event::ApplySlice(Arc::new(slice(number, endpoints)))
}

fn cluster_ip(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(127, 98, high, low)
}

/// Services share pods here: who answers makes no difference to a plan.
fn pod(number: u16, host: u8) -> Ipv4Addr {
    let [_, low] = number.to_be_bytes();
    Ipv4Addr::new(127, 99, low, host)
}

fn write_manifests(folder: &Path, count: u16) -> Outcome<()> {
    let each = count.div_ceil(FILES);
    for file in 0..FILES {
        let numbers = file * each..((file + 1) * each).min(count);
        let text: String = numbers.map(|number| manifest(number).unwrap_or_default()).collect();
        fs::write(folder.join(format!("services-{file}.yaml")), text)?;
    }
    Ok(())
}

/// As people and controllers write it: a Service and its EndpointSlice.
fn manifest(number: u16) -> Result<String, std::fmt::Error> {
    let (name, ip) = (format!("s{number:05}"), cluster_ip(number));
    let mut text = String::with_capacity(1024);
    writeln!(text, "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {ip}")?;
    writeln!(text, "  ports:\n    - name: http\n      port: {PORT}\n      targetPort: 8000")?;
    writeln!(text, "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1")?;
    writeln!(text, "  labels:\n    kubernetes.io/service-name: {name}\naddressType: IPv4")?;
    writeln!(text, "ports:\n  - name: http\n    port: 8000\nendpoints:")?;
    for host in 0..ENDPOINTS {
        let ip = pod(number, host);
        writeln!(text, "  - addresses: [{ip}]\n    conditions:\n      ready: true")?;
    }
    Ok(text)
}
