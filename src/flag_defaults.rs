//! The command line with a configuration file behind it: the file's values become the defaults of the flags.
//!
//! So a flag or its environment variable overrides the file, and the file overrides the default, for every flag alike.
//! What a file says is `config_file`; the flags themselves are `cli`.

use std::error::Error;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, FromArgMatches, Parser};

use crate::cli::{Cli, Command, ConfigFlag};
use crate::config_file::{self, ConfigFile, ConfigFileError};

/// Why there is no command to carry out.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The command line is wrong, or asks for help.
    #[error(transparent)]
    Usage(clap::Error),
    /// The file of `--config` is wrong.
    #[error("{source}")]
    File {
        /// Exit code of the command that it was named for.
        failure: u8,
        /// What is wrong.
        source: ConfigFileError,
    },
}

/// Reads a command line (the program's name first), and the file that its `--config` names.
pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Cli, StartError> {
    let line: Vec<OsString> = line.into_iter().collect();
    let mut cli = Cli::try_parse_from(&line).map_err(StartError::Usage)?;
    let Some(path) = config_flag(&mut cli).and_then(|flag| flag.config.clone()) else { return Ok(cli) };
    let failure = cli.command.failure();
    let mut file = config_file::read(&path, &judge).map_err(|source| StartError::File { failure, source })?;
    let overridden = cli.command.overridden_sources();
    file.values.retain(|flag, _| !overridden.contains(flag));
    let mut command = Cli::command();
    for subcommand in ["run", "check", "explain", "diff", "doctor"] {
        command = command.mut_subcommand(subcommand, |subcommand| with_defaults(subcommand, &file));
    }
    let matches = command.try_get_matches_from(&line).map_err(StartError::Usage)?;
    let mut cli = Cli::from_arg_matches(&matches).map_err(StartError::Usage)?;
    if let Some(flag) = config_flag(&mut cli) {
        flag.file = Some(file);
    }
    Ok(cli)
}

fn config_flag(cli: &mut Cli) -> Option<&mut ConfigFlag> {
    match &mut cli.command {
        Command::Run(args) => Some(&mut args.config),
        Command::Check(args) => Some(&mut args.config),
        Command::Explain(args) => Some(&mut args.config),
        Command::Diff(args) => Some(&mut args.config),
        Command::Doctor(args) => Some(&mut args.config),
        Command::Status(_)
        | Command::Top(_)
        | Command::Env(_)
        | Command::New(_)
        | Command::Upgrade(_)
        | Command::Ready(_)
        | Command::Cleanup(_) => None,
        Command::Completions(_) | Command::Man(_) => None,
    }
}

/// A command has some of the flags only.
fn with_defaults(command: clap::Command, file: &ConfigFile) -> clap::Command {
    command.mut_args(|arg| match file.values.get(arg.get_id().as_str()) {
        Some(values) => arg.default_values(values.clone()),
        None => arg,
    })
}

/// Lets the flag of `run` itself say whether it would take the values.
fn judge(flag: &str, values: &[String]) -> Result<(), String> {
    let command = Cli::command();
    let run = command.find_subcommand("run").and_then(|run| run.get_arguments().find(|arg| arg.get_id() == flag));
    let long = run.and_then(|arg| arg.get_long()).ok_or("there is no such flag")?;
    let mut line = ["kube-relay", "run", "--source=-"].map(str::to_owned).to_vec();
    if flag == "sources" {
        line.pop();
    }
    line.extend(values.iter().map(|value| format!("--{long}={value}")));
    command.try_get_matches_from(line).map(|_| ()).map_err(|error| what_is_right(&error))
}

fn what_is_right(error: &clap::Error) -> String {
    match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(source), _) => source.to_string(),
        (None, Some(ContextValue::Strings(words))) => format!("write one of {}", words.join(", ")),
        (None, _) => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;
    use crate::access_log::{AccessFormat, AccessOutput};
    #[cfg(feature = "kubernetes")]
    use crate::api_client::ApiOptions;
    use crate::config::{CheckConfig, DEFAULT_METRICS_ADDRESS, RunConfig, SourceConfig};
    use crate::config_fields::Kind;
    use crate::guard::VipGuard;
    use crate::logs::LogFormat;
    use crate::manifest::Input;
    use crate::vips::{AtExit, VipOptions};

    /// A command line with this text as the file of its `--config`.
    fn with_file(text: &str, line: &str) -> Result<Cli, StartError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("relay.yaml");
        fs::write(&path, text).expect("a file");
        let words = line.split_whitespace().map(OsString::from);
        parse(words.chain(["--config".into(), path.into_os_string()]))
    }

    fn run(text: &str, line: &str) -> RunConfig {
        match with_file(text, &format!("kube-relay run {line}")).expect("a fine file").command {
            Command::Run(args) => RunConfig::try_from(*args).expect("a fine configuration"),
            other => panic!("not run: {other:?}"),
        }
    }

    fn relay(fields: &str) -> String {
        format!("apiVersion: kube-relay.dev/v1alpha1\nkind: RelayConfiguration\n{fields}")
    }

    fn kube_proxy(fields: &str) -> String {
        format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}")
    }

    #[test]
    fn given_a_flag_in_the_file_and_on_the_line_when_parsed_then_the_line_counts_and_other_defaults_stay() {
        let file = relay("healthzBindAddress: 10.0.0.5:1\ndrainTimeout: 7s\nnodePortAddresses: [all, 10.0.0.0/8]\n");

        let config = run(&file, "-f x --healthz-bind-address 10.0.0.5:2 --nodeport-addresses localhost");

        assert_eq!(config.healthz_address, Some(([10, 0, 0, 5], 2).into()));
        assert_eq!(config.shutdown.drain_timeout, Duration::from_secs(7));
        assert_eq!(config.plan.node_port_addresses.len(), 1, "a list is replaced, not added to");
        assert_eq!(config.metrics_address, Some(DEFAULT_METRICS_ADDRESS));
    }

    #[test]
    fn given_a_switch_in_the_file_when_the_line_says_false_then_it_is_off() {
        let file = relay("bindAddressHardFail: true\n");

        assert!(run(&file, "-f x").bind_address_hard_fail);
        assert!(!run(&file, "-f x --bind-address-hard-fail=false").bind_address_hard_fail);
        assert!(run(&relay(""), "-f x --bind-address-hard-fail").bind_address_hard_fail);
    }

    #[test]
    fn given_sources_in_the_file_when_run_or_check_name_none_then_those_are_taken() {
        let file = relay("sources: [a.yaml, b]\n");

        let Command::Check(args) = with_file(&file, "kube-relay check").expect("fine").command else {
            panic!("not check")
        };

        let both = [Input::from("a.yaml"), Input::from("b")];
        assert_eq!(run(&file, "").source, SourceConfig::Manifests(both.to_vec()));
        assert_eq!(CheckConfig::try_from(*args).expect("fine").sources, both);
        assert_eq!(run(&file, "-f c").source, SourceConfig::Manifests(vec![Input::from("c")]));
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn given_one_source_in_the_file_and_another_on_the_line_when_parsed_then_the_line_counts() {
        let (server, files) = (kube_proxy("clientConnection: {kubeconfig: /k}\n"), relay("sources: [x]\n"));
        let api = |kubeconfig: Option<&str>, master: Option<&str>| {
            let server = ApiOptions { kubeconfig: kubeconfig.map(Into::into), master: master.map(Into::into) };
            SourceConfig::Api { server, service_host: None }
        };

        assert_eq!(run(&server, "-f x").source, SourceConfig::Manifests(vec![Input::from("x")]));
        assert_eq!(run(&server, "").source, api(Some("/k"), None));
        assert_eq!(run(&server, "--master 10.0.0.1:6443").source, api(Some("/k"), Some("10.0.0.1:6443")));
        assert_eq!(run(&files, "--master 10.0.0.1:6443").source, api(None, Some("10.0.0.1:6443")));
    }

    #[test]
    fn given_no_source_anywhere_when_run_then_it_is_asked_for() {
        let Command::Run(args) = with_file(&relay(""), "kube-relay run").expect("a fine file").command else {
            panic!("not run")
        };

        let error = RunConfig::try_from(*args).expect_err("no source");

        assert!(error.to_string().contains("'--source'"), "{error}");
    }

    #[test]
    fn given_every_field_of_ours_when_parsed_then_each_is_in_the_configuration() {
        let config = run(
            &relay(
                "metadata: {name: edge}\nsources: [x]\nmetricsBindAddress: none\nstatusBindAddress: 127.0.0.3\n\
                 healthzBindAddress: 10.0.0.5\nbindAddressHardFail: true\n\
                 nodePortAddresses: [primary]\nexpose: ['0.0.0.0:80=web:http', '0.0.0.0:81=web:http']\n\
                 stateDir: /s\nendpointCIDRs: [10.244.0.0/16, fd00::/48]\nrequireTargetRef: true\n\
                 allowedExternalCIDRs: 203.0.113.0/24\nallowFrom: [198.51.100.0/24, 192.0.2.7]\nacceptProxyFrom: [10.0.0.9, \"fd00::9\"]\nacceptProxyTimeout: 12s\nserviceClusterIPRange: none\nserviceNodePortRange: 1-9\n\
                 clusterCIDR: 10.244.0.0/16, fd00::/48\nproxyName: kube-relay\nnodeName: worker-1\nzone: z\n\
                 nodeAddresses: [10.0.0.5]\nupstreamSources: [10.0.0.6]\nshutdownDelay: 3s\ndrainTimeout: 4s\n\
                 connectTimeout: 1s\nconnectTries: 2\nejectAfter: 3\nhalfCloseTimeout: 8s\nidleTimeout: 9s\n\
                 maxConnectionAge: none\nmaxConnections: 1000\n\
                 udpTimeouts: {unreplied: 5s, answered: 6s, stream: 7s}\nudpShards: 2\nworkers: 3\n\
                 vipRoutes: auto\nvipRoutesLinger: 8s\nvipRoutesAtExit: remove\nvipGuard: none\nrouteProtocol: 207\nreplyMark: 0x2/0xf\ntuneSysctls: true\n\
                 logging: {level: debug, format: json}\n\
                 accessLog: {path: /var/log/a.log, format: logfmt, sample: 9}\n",
            ),
            "",
        );

        assert_eq!((config.metrics_address, config.healthz_address), (None, Some(([10, 0, 0, 5], 10256).into())));
        assert_eq!(config.status_address, Some(([127, 0, 0, 3], 10249).into()));
        assert!(config.bind_address_hard_fail);
        assert_eq!((config.plan.expose.len(), config.plan.allowed_external_cidrs.len()), (2, 1));
        assert_eq!((config.plan.allow_from.len(), config.plan.accept_proxy_from.len()), (2, 2));
        assert_eq!((config.plan.service_cluster_ip_range, config.plan.service_node_port_range), (None, 1..=9));
        assert_eq!((config.plan.cluster_cidrs.len(), config.plan.node_addresses.len()), (2, 1));
        assert_eq!((config.plan.endpoint_cidrs.len(), config.state_dir), (2, Some("/s".into())));
        assert!(config.plan.require_target_ref);
        assert_eq!(config.plan.proxy_name.as_deref(), Some("kube-relay"));
        assert_eq!((config.plan.node.name.as_deref(), config.plan.node.zone.as_deref()), (Some("worker-1"), Some("z")));
        assert_eq!(config.upstream.sources.len(), 1);
        assert_eq!(config.upstream.steps.total(), Duration::from_secs(3));
        assert_eq!(config.upstream.eject_after.map(u8::from), Some(3));
        let limits = config.limits;
        assert_eq!((limits.half_close_timeout.as_secs(), limits.max_connection_age), (8, None));
        assert_eq!(limits.idle_timeout, Some(Duration::from_secs(9)));
        assert_eq!(config.max_connections.map(u32::from), Some(1_000));
        assert_eq!(config.header_timeout, Duration::from_secs(12));
        assert_eq!(config.shutdown.delay, Duration::from_secs(3));
        assert_eq!(config.shutdown.drain_timeout, Duration::from_secs(4));
        let times = config.udp_timeouts;
        assert_eq!([times.unreplied, times.answered, times.stream], [5, 6, 7].map(Duration::from_secs));
        assert_eq!((config.udp_shards.get(), config.workers), (2, Some(3)));
        assert_eq!(config.reply_path.mark.to_string(), "0x2/0xf");
        let linger = Duration::from_secs(8);
        assert_eq!(
            config.vips,
            Some(VipOptions { protocol: 207, linger, at_exit: AtExit::Remove, tune_sysctls: true })
        );
        assert_eq!(config.vip_guard, VipGuard::None);
        assert_eq!((config.logs.level.to_string().as_str(), config.logs.format), ("debug", LogFormat::Json));
        let access_log = config.access_log.expect("a path is given");
        assert_eq!(access_log.output, AccessOutput::File("/var/log/a.log".into()));
        assert_eq!((access_log.format, access_log.sample.get()), (AccessFormat::Logfmt, 9));
    }

    #[test]
    fn given_the_flags_of_run_when_compared_with_our_kind_then_each_has_its_field() {
        let flags: Vec<&str> = Kind::Relay.fields().iter().flat_map(|field| field.flags).copied().collect();
        // The third one is the way in which a pod's environment is asked; the last two are of a start, not of a configuration.
        let of_the_line = ["config", "help", "kubernetes_service_host", "take_over", "pod_uid"];
        let command = Cli::command();
        let run = command.find_subcommand("run").expect("run");

        let without: Vec<&str> = run
            .get_arguments()
            .map(|arg| arg.get_id().as_str())
            .filter(|flag| !of_the_line.contains(flag) && !flags.contains(flag))
            .collect();

        assert_eq!(without, [] as [&str; 0], "flags that no file can set");
        let known = |flag: &&str| run.get_arguments().any(|arg| arg.get_id() == *flag);
        assert!(Kind::ALL.iter().flat_map(|kind| kind.fields()).flat_map(|field| field.flags).all(known));
    }

    #[test]
    fn given_kube_proxys_fields_when_parsed_then_those_that_apply_are_taken() {
        let config = run(
            &kube_proxy(
                "bindAddress: 10.0.0.5\nbindAddressHardFail: true\n\
                 clusterCIDR: 10.244.0.0/16,fd00::/48\nhealthzBindAddress: 0.0.0.0:10356\nmetricsBindAddress: 0.0.0.0\n\
                 hostnameOverride: worker-1\nnodePortAddresses: [10.0.0.0/8]\nmode: userspace\n\
                 conntrack: {udpTimeout: 20s, udpStreamTimeout: 2m0s}\nlogging: {format: text}\n",
            ),
            "-f x",
        );

        assert_eq!(config.plan.node_addresses, [std::net::IpAddr::from([10, 0, 0, 5])]);
        assert!(config.bind_address_hard_fail);
        assert_eq!(config.plan.cluster_cidrs.len(), 2);
        assert_eq!(config.healthz_address, Some(([0, 0, 0, 0], 10356).into()));
        assert_eq!(config.metrics_address, Some(([0, 0, 0, 0], 10249).into()), "an IP alone gets the port");
        assert_eq!(config.plan.node.name.as_deref(), Some("worker-1"));
        assert_eq!(config.plan.node_port_addresses[0].to_string(), "10.0.0.0/8");
        let times = config.udp_timeouts;
        assert_eq!([times.unreplied, times.answered, times.stream], [20, 20, 120].map(Duration::from_secs));
        assert_eq!(config.logs.format, LogFormat::Text);
    }

    #[test]
    fn given_the_idle_time_of_the_userspace_mode_when_parsed_then_it_goes_before_those_of_conntrack() {
        let times = run(&kube_proxy("udpIdleTimeout: 3s\nconntrack: {udpTimeout: 9s}\n"), "-f x").udp_timeouts;

        assert_eq!([times.unreplied, times.answered, times.stream], [Duration::from_secs(3); 3]);
    }

    #[test]
    fn given_values_that_a_flag_refuses_when_parsed_then_place_value_and_remedy_are_told() {
        let cases = [
            ("drainTimeout: 30\n", ":3:15: ", "30 where text is wanted"),
            ("drainTimeout: soon\n", ":3:15: ", "drainTimeout: \"soon\": not a time: write 10s"),
            ("workers: 0\n", ":3:10: ", "workers: \"0\": 0 is not in 1..=1024"),
            ("ejectAfter: true\n", ":3:13: ", "a number or none"),
            ("ejectAfter: often\n", ":3:13: ", "ejectAfter: \"often\": write a number from 1 to 255, or none"),
            ("logging:\n  format: xml\n", ":4:11: ", "write one of auto, text, json"),
            ("udpTimeouts: 5s\n", ":3:14: ", "where a mapping is wanted"),
            ("allowFrom: []\n", ":3:12: ", "a list with an entry (or no such field) is wanted"),
            ("allowFrom: [10.0.0.0/8, web]\n", ":3:25: ", "allowFrom[1]: \"web\": write a network or an address"),
            ("nodePortAddresses:\n- eth0\n", ":4:3: ", "nodePortAddresses[0]: \"eth0\": neither"),
            ("bindAddressHardFail: maybe\n", ":3:22: ", "true or false"),
        ];

        for (fields, place, right) in cases {
            let error = with_file(&relay(fields), "kube-relay run -f x").expect_err("a wrong value").to_string();
            assert!(error.contains(&format!("relay.yaml{place}RelayConfiguration: ")), "{fields}: {error}");
            assert!(error.contains(right), "{fields}: {error}");
        }
    }
}
