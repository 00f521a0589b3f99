//! The file of `--config`: what it says, as values of flags, and all that is wrong with it, with its place.
//!
//! Which field stands for which flag is `config_fields`. The grammar of values is the flags' own: who reads a file passes
//! a `Grammar`. That flags go before the file, and the file before defaults, is `flag_defaults`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde::de::MapAccess;
use serde_json::Value;

use crate::config_fields::{Field, Form, Kind};
use crate::findings::{Findings, MAX_FINDINGS, closest, located};
use crate::locate::At;
use crate::plan::{Problem, Severity};
use crate::yaml::{self, Document, Fields, Object};

/// Size of a configuration file. A hundred times what people write.
const MAX_BYTES: u64 = 1 << 20;
/// What every document has beside its fields. `metadata` is for tools; nothing is read there.
const HEAD: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// What a flag says of values: `Err` with what would be right.
pub(crate) type Grammar<'g> = &'g dyn Fn(&str, &[String]) -> Result<(), String>;

/// What a configuration file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigFile {
    /// Its path, as it was given.
    pub path: String,
    /// `RelayConfiguration` or `KubeProxyConfiguration`.
    pub kind: &'static str,
    /// Values by flag, the flags by their names in `cli`.
    pub(crate) values: BTreeMap<&'static str, Vec<String>>,
    /// Fields that have no meaning here, and those that nobody knows: `iptables.syncPeriod`.
    pub ignored: Vec<String>,
    /// What to say of them, each with its place.
    pub findings: Vec<Problem>,
}

/// A configuration file that cannot be used. Printed as a line for each problem.
#[derive(Debug, thiserror::Error)]
pub struct ConfigFileError {
    /// All that is wrong, and what else was found.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errors = self.problems.iter().filter(|problem| problem.severity == Severity::Error);
        for (number, problem) in errors.enumerate() {
            let line_end = if number == 0 { "" } else { "\n" };
            write!(f, "{line_end}{problem}")?;
        }
        Ok(())
    }
}

/// Reads a configuration file.
pub(crate) fn read(path: &Path, grammar: Grammar<'_>) -> Result<ConfigFile, ConfigFileError> {
    let name = path.display().to_string();
    match bounded(path) {
        Ok(text) => decode(&text, &name, grammar),
        Err(error) => Err(ConfigFileError { problems: vec![whole_file(&name, format!("cannot be read: {error}"))] }),
    }
}

fn bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("larger than 1 MiB: is it a configuration file?"));
    }
    Ok(text)
}

/// Reads the one document of a kind of ours; others may stand beside it, as in what kubeadm prints.
fn decode(text: &str, name: &str, grammar: Grammar<'_>) -> Result<ConfigFile, ConfigFileError> {
    let mut file = ConfigFile { path: name.to_owned(), ..ConfigFile::default() };
    let (mut ours, mut others) = (0, Vec::new());
    for document in yaml::documents(text) {
        let (values, error) = yaml::read::<Tree>(document);
        for (document, value) in values {
            match Kind::of(&value) {
                Ok(kind) => {
                    ours += 1;
                    file.take(kind, document, &value, grammar);
                }
                Err(other) => others.push(other),
            }
        }
        if let Some(error) = error {
            let line = document.line + error.line.map_or(0, |line| line.saturating_sub(1));
            let problem = whole_file(name, format!("cannot be read: {error}"));
            file.findings.push(Problem { line: Some(line), column: error.column, ..problem });
        }
    }
    let broken = file.findings.iter().any(|problem| problem.severity == Severity::Error);
    if ours != 1 && !broken {
        file.findings.push(whole_file(name, wanted_one(ours, &others)));
    }
    match file.findings.iter().any(|problem| problem.severity == Severity::Error) {
        true => Err(ConfigFileError { problems: file.findings }),
        false => Ok(file),
    }
}

fn wanted_one(found: usize, others: &[String]) -> String {
    let [relay, kube_proxy] = Kind::ALL.map(|kind| format!("{} ({})", kind.as_str(), kind.version()));
    let wanted = format!("a {relay} or a {kube_proxy} is wanted");
    match others.first() {
        _ if found > 1 => format!("{found} documents of kinds that are read, but one is wanted"),
        Some(other) if other == "ConfigMap" => {
            format!("a ConfigMap, but {wanted}: mount it, and name the file, like config.conf")
        }
        Some(other) => format!("{other} where {wanted}"),
        None => format!("empty, but {wanted}"),
    }
}

fn whole_file(name: &str, message: String) -> Problem {
    Problem { file: Some(name.to_owned()), ..Problem::error(name, "decode", message) }
}

/// A document as it was written, in the order of its lines.
#[derive(Debug, Default)]
struct Tree(Vec<(Box<str>, Value)>);

impl Fields for Tree {
    const READ: &'static [&'static str] = &[];
    const UNUSED: &'static [&'static str] = &[];
    const FREE: bool = true;

    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        self.0.push((key.into(), map.next_value()?));
        Ok(true)
    }
}

impl Tree {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find_map(|(found, value)| (&**found == key).then_some(value))
    }
}

impl Kind {
    /// The kind of a document; a word for another one.
    fn of(value: &Object<Tree>) -> Result<Self, String> {
        let Object::Fields(tree, _) = value else { return Err("something that is no mapping".to_owned()) };
        let word = tree.get("kind").and_then(Value::as_str).ok_or("a document without kind")?;
        Self::ALL.into_iter().find(|kind| kind.as_str() == word).ok_or_else(|| word.to_owned())
    }
}

impl ConfigFile {
    fn take(&mut self, kind: Kind, document: Document<'_>, value: &Object<Tree>, grammar: Grammar<'_>) {
        let Object::Fields(tree, _) = value else { return };
        let mut reading = Reading { kind, grammar, found: Findings::new(MAX_FINDINGS), taken: BTreeMap::new() };
        reading.found.of(kind.as_str());
        reading.head(tree);
        for (key, value) in tree.0.iter().filter(|(key, _)| !HEAD.contains(&&**key)) {
            reading.value(At::Root.key(key), key, value);
        }
        self.kind = kind.as_str();
        self.ignored.extend(reading.found.list.iter().map(|finding| finding.path.to_string()));
        self.findings.extend(located(reading.found.list, document, &self.path));
        for (position, values) in reading.taken {
            let field = &kind.fields()[position];
            self.values.extend(field.flags.iter().map(|flag| (*flag, values.clone())));
        }
    }
}

/// The reading of one document.
struct Reading<'g> {
    kind: Kind,
    grammar: Grammar<'g>,
    found: Findings,
    /// Values by the position of their field in the kind's table, so that its order decides.
    taken: BTreeMap<usize, Vec<String>>,
}

impl Reading<'_> {
    fn head(&mut self, tree: &Tree) {
        let right = self.kind.version();
        match tree.get("apiVersion") {
            Some(version) if version == right => {}
            Some(version) => {
                self.found.error(At::Root.key("apiVersion"), format!("{version} is not read, write {right}"))
            }
            None => self.found.error(At::Root.key("apiVersion"), format!("missing, write {right}")),
        }
    }

    /// Takes a field, or what is inside a section. `path` is the way to it.
    fn value(&mut self, at: At<'_>, path: &str, value: &Value) {
        let fields = self.kind.fields();
        if let Some(position) = fields.iter().position(|field| field.path == path) {
            return self.field(at, position, value);
        }
        let is_section = fields.iter().any(|field| is_below(field.path, path));
        match value {
            _ if self.says_nothing(value) => {}
            Value::Object(inside) if is_section => {
                for (key, value) in inside {
                    self.value(at.key(key), &format!("{path}.{key}"), value);
                }
            }
            _ if is_section => self.found.error(at, format!("{} where a mapping is wanted", shown(value))),
            _ => self.foreign(at, path, value),
        }
    }

    /// A field that is not taken: kube-proxy's own, or nobody's.
    fn foreign(&mut self, at: At<'_>, path: &str, value: &Value) {
        let known = self.kind.inapplicable();
        let top = path.split('.').next().unwrap_or(path);
        if known.contains(&top) {
            return self.inapplicable(at, value);
        }
        let section = path.rsplit_once('.').map_or("", |(section, _)| section);
        let siblings = self.kind.fields().iter().filter_map(|field| field.path.strip_prefix(section));
        let siblings = siblings.filter_map(|rest| rest.trim_start_matches('.').split('.').next());
        let siblings: Vec<&str> = siblings.chain(known.iter().copied()).collect();
        match at {
            // Our own kind has no fields that we do not know; kube-proxy's next release may.
            At::Key(outer, key) if self.kind == Kind::Relay || closest(key, siblings.iter().copied()).is_some() => {
                self.found.unknown(*outer, key, &siblings);
            }
            _ => self.found.note(at, "unknown_field", "unknown field, it is ignored"),
        }
    }

    /// Names each single field in it that says something.
    fn inapplicable(&mut self, at: At<'_>, value: &Value) {
        match value {
            _ if self.says_nothing(value) => {}
            Value::Object(inside) => inside.iter().for_each(|(key, value)| self.inapplicable(at.key(key), value)),
            _ => self.found.note(at, "not_applicable", format!("{} has no meaning here, it is ignored", shown(value))),
        }
    }

    fn field(&mut self, at: At<'_>, position: usize, value: &Value) {
        let field = &self.kind.fields()[position];
        if field.path == "nodePortAddresses" && self.kind == Kind::KubeProxy && self.says_nothing(value) {
            let text =
                "none named: kube-proxy takes all addresses then, here the default of --nodeport-addresses holds";
            return self.found.note(at, "not_applicable", text);
        }
        if self.says_nothing(value) {
            return;
        }
        let values = match words(field.form, value) {
            Ok(values) if values.is_empty() => return,
            Ok(values) => values,
            Err(Odd::Wrong(wanted)) => {
                return self.found.error(at, format!("{} where {wanted} is wanted", shown(value)));
            }
            Err(Odd::Inapplicable) => return self.inapplicable(at, value),
        };
        let errors = self.found.errors();
        match value {
            // Each item by itself, so that the place is the wrong one's.
            Value::Array(_) => {
                (0..values.len()).for_each(|item| self.judge(at.index(item), field, &values[item..=item]))
            }
            _ => self.judge(at, field, &values),
        }
        if self.found.errors() == errors {
            self.taken.insert(position, values);
        }
    }

    fn judge(&mut self, at: At<'_>, field: &Field, values: &[String]) {
        if let Err(right) = field.flags.iter().try_for_each(|flag| (self.grammar)(flag, values)) {
            self.found.error(at, format!("{:?}: {right}", values.join(",")));
        }
    }

    /// True where the field might as well not be there. kube-proxy has a default behind every empty value; in our kind
    /// zero and nothing are values.
    fn says_nothing(&self, value: &Value) -> bool {
        value.is_null() || self.kind == Kind::KubeProxy && is_empty(value)
    }
}

fn is_below(path: &str, section: &str) -> bool {
    path.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

/// Why a value is not taken.
enum Odd {
    /// What is wanted instead.
    Wrong(&'static str),
    /// It is right, but means nothing here.
    Inapplicable,
}

/// A value as the words of its flag; none where it says nothing.
fn words(form: Form, value: &Value) -> Result<Vec<String>, Odd> {
    let one = |text: String| Ok(vec![text]);
    match (form, value) {
        (Form::Text, Value::String(text)) => one(text.clone()),
        (Form::Text, _) => Err(Odd::Wrong("text")),
        (Form::Number, Value::Number(number)) => one(number.to_string()),
        (Form::Number, _) => Err(Odd::Wrong("a number")),
        (Form::NumberOrNone, Value::Number(number)) => one(number.to_string()),
        (Form::NumberOrNone, Value::String(text)) => one(text.clone()),
        (Form::NumberOrNone, _) => Err(Odd::Wrong("a number or none")),
        (Form::Switch, Value::Bool(flag)) => one(flag.to_string()),
        (Form::Switch, _) => Err(Odd::Wrong("true or false")),
        (Form::Entries, Value::Array(items)) if items.is_empty() => {
            Err(Odd::Wrong("a list with an entry (or no such field)"))
        }
        (Form::List | Form::Entries, Value::String(text)) => {
            Ok(text.split(',').map(|item| item.trim().to_owned()).collect())
        }
        (Form::List | Form::Entries, Value::Array(items)) => {
            items.iter().map(|item| item.as_str().map(str::to_owned).ok_or(Odd::Wrong("a list of text"))).collect()
        }
        (Form::List | Form::Entries, _) => Err(Odd::Wrong("a list of text")),
        (Form::Address(port), Value::String(text)) => one(with_port(text, port)),
        (Form::Address(_), _) => Err(Odd::Wrong("an address")),
        (Form::NodeAddress, Value::String(text)) => match text.parse() {
            Ok(ip) if IpAddr::is_unspecified(&ip) => Ok(Vec::new()),
            _ => one(text.clone()),
        },
        (Form::NodeAddress, _) => Err(Odd::Wrong("an address")),
        (Form::Mode, Value::String(mode)) if mode == "userspace" => Ok(Vec::new()),
        (Form::Mode, _) => Err(Odd::Inapplicable),
    }
}

fn with_port(text: &str, port: u16) -> String {
    text.parse::<IpAddr>().map_or_else(|_| text.to_owned(), |ip| SocketAddr::new(ip, port).to_string())
}

/// Enough of a value to recognize it.
fn shown(value: &Value) -> String {
    const SHOWN: usize = 60;
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
        Value::String(text) if text.chars().nth(SHOWN).is_some() => {
            format!("\"{}…\"", text.chars().take(SHOWN).collect::<String>().escape_debug())
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBEADM: &str = include_str!("../tests/configs/kubeadm.conf");

    /// Any value is fine.
    fn read(text: &str) -> Result<ConfigFile, ConfigFileError> {
        decode(text, "file.yaml", &|_, _| Ok(()))
    }

    fn findings(file: &ConfigFile) -> Vec<String> {
        file.findings.iter().map(ToString::to_string).collect()
    }

    fn refused(text: &str) -> String {
        read(text).expect_err("a wrong file").to_string()
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn given_what_kubeadm_writes_when_read_then_it_is_taken_and_only_the_node_ports_are_worth_a_word() {
        let file = read(KUBEADM).expect("unchanged, it is fine");

        assert_eq!(file.kind, "KubeProxyConfiguration");
        let values = [("cluster_cidr", "10.244.0.0/16"), ("kubeconfig", "/var/lib/kube-proxy/kubeconfig.conf")];
        assert_eq!(file.values, values.map(|(flag, value)| (flag, vec![value.to_owned()])).into());
        assert_eq!(file.ignored, ["nodePortAddresses"]);
        assert!(file.findings.iter().all(|finding| finding.severity == Severity::Note));
    }

    #[test]
    fn given_fields_without_meaning_here_when_read_then_each_is_named_with_its_place() {
        let text = KUBEADM
            .replace("mode: \"\"", "mode: ipvs")
            .replace("  syncPeriod: 0s\nipvs", "  syncPeriod: 30s\nipvs")
            .replace("qps: 0", "qps: 5")
            .replace("nodePortAddresses: null", "nodePortAddresses: [primary]");

        let file = read(&text).expect("fine");

        assert_eq!(file.ignored, ["clientConnection.qps", "iptables.syncPeriod", "mode"]);
        assert_eq!(
            findings(&file)[0],
            "file.yaml:9:8: KubeProxyConfiguration: clientConnection.qps: 5 has no meaning here, it is ignored"
        );
    }

    #[test]
    fn given_fields_that_nobody_knows_when_read_then_a_near_one_is_proposed_and_newer_ones_pass() {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

        let file = read(&format!("{head}clusterCidr: 10.0.0.0/8\nfutureThing: {{a: 1}}\n")).expect("fine");

        assert_eq!(file.ignored, ["clusterCidr", "futureThing"]);
        assert_eq!(
            findings(&file)[0],
            "file.yaml:3:1: KubeProxyConfiguration: clusterCidr: unknown field, did you mean clusterCIDR?"
        );
        assert_eq!(
            file.findings.iter().map(|finding| finding.severity).collect::<Vec<_>>(),
            [Severity::Warning, Severity::Note]
        );
    }

    #[test]
    fn t230_given_an_unknown_field_of_ours_when_read_then_it_is_a_warning_at_its_name() {
        let text = "kind: RelayConfiguration\napiVersion: kube-relay.dev/v1alpha1\nudpTimeouts:\n  steam: 5s\n";

        let file = read(text).expect("fine");

        let told = "file.yaml:4:3: RelayConfiguration: udpTimeouts.steam: unknown field, did you mean stream?";
        assert_eq!(findings(&file), [told]);
        assert_eq!(file.findings[0].severity, Severity::Warning);
    }

    #[test]
    fn given_a_dual_stack_wildcard_when_read_then_it_names_no_address_of_the_node() {
        for wildcard in ["0.0.0.0", "'::'"] {
            let text = KUBEADM.replace("bindAddress: 0.0.0.0", &format!("bindAddress: {wildcard}"));
            assert!(!read(&text).expect("fine").values.contains_key("node_address"));
        }
    }

    #[test]
    fn given_other_documents_beside_ours_when_read_then_they_are_passed_over() {
        let cluster = "apiVersion: kubeadm.k8s.io/v1beta3\nkind: ClusterConfiguration\n";

        let file = read(&format!("{cluster}---\n{KUBEADM}")).expect("fine");

        assert_eq!(file.kind, "KubeProxyConfiguration");
    }

    #[test]
    fn given_files_that_are_something_else_when_read_then_what_is_wanted_is_told() {
        assert!(refused("").contains("empty, but a RelayConfiguration (kube-relay.dev/v1alpha1)"), "{}", refused(""));
        assert!(refused("kind: ConfigMap\n").contains("mount it"));
        assert!(refused(&format!("{KUBEADM}---\n{KUBEADM}")).contains("2 documents"));
        assert!(refused("- 1\n").contains("no mapping"));
        let version = refused("kind: RelayConfiguration\napiVersion: v1\n");
        assert!(version.starts_with("file.yaml:2:13: ") && version.contains("kube-relay.dev/v1alpha1"), "{version}");
        let broken = refused("kind: RelayConfiguration\nworkers: [\n");
        assert!(broken.starts_with("file.yaml:") && broken.contains("cannot be read"), "{broken}");
    }

    #[test]
    fn given_two_wrong_values_when_read_then_both_are_told_a_line_each() {
        let text = "apiVersion: kube-relay.dev/v1alpha1\nkind: RelayConfiguration\nzone: 5\nworkers: four\n";

        let told = refused(text);

        assert_eq!(told.lines().count(), 2, "{told}");
        assert!(told.lines().all(|line| line.starts_with("file.yaml:")), "{told}");
    }

    #[test]
    fn given_no_such_file_when_read_then_its_path_is_told() {
        let error = super::read(Path::new("/nowhere/relay.yaml"), &|_, _| Ok(())).expect_err("not there");

        assert!(error.to_string().starts_with("/nowhere/relay.yaml: cannot be read: "), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn given_a_cut_file_when_read_then_nothing_panics(end in 0..KUBEADM.len()) {
            let _ = read(&KUBEADM[..end]);
        }
    }
}
