//! What a Service says about the address that its backends see: the annotation `kube-relay.dev/source-address`.
//!
//! How a client's own address is kept is `serve::preserve`; how answers to it are led here is `reply_path`.

use serde::{Deserialize, Serialize};

use crate::model::Service;
use crate::problem::Problem;

const SOURCE_ADDRESS: &str = "source-address";

/// Whose address the backends of a Service see. From `kube-relay.dev/source-address`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceAddress {
    /// One of this node: what a Service gets that does not say.
    #[default]
    Node,
    /// The client's, where its answers come back through this node.
    Preserve,
}

impl SourceAddress {
    /// Reads a Service's annotation. One that cannot be read is a problem, and as if it were not there.
    pub(crate) fn of(service: &Service, problems: &mut Vec<Problem>) -> Self {
        let Some(text) = service.annotations.get(SOURCE_ADDRESS) else { return Self::default() };
        match text.trim() {
            "node" => Self::Node,
            "preserve" => Self::Preserve,
            _ => {
                let message =
                    format!("annotation kube-relay.dev/{SOURCE_ADDRESS}: {text:?} is not used: write preserve or node");
                problems.push(Problem::error(format_args!("Service {}", service.name), "annotation", message));
                Self::default()
            }
        }
    }

    /// True where the client's address is to be kept.
    pub fn is_preserved(self) -> bool {
        self == Self::Preserve
    }

    /// True for what a Service gets that does not say.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> (SourceAddress, Vec<String>) {
        let mut service = Service::new("default/web");
        service.annotations.insert(SOURCE_ADDRESS.into(), value.into());
        let mut problems = Vec::new();
        let read = SourceAddress::of(&service, &mut problems);
        (read, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn given_words_when_read_then_each_is_taken() {
        assert_eq!(read("preserve"), (SourceAddress::Preserve, vec![]));
        assert_eq!(read(" node "), (SourceAddress::Node, vec![]));
        assert_eq!(SourceAddress::of(&Service::new("default/web"), &mut Vec::new()), SourceAddress::Node);
    }

    #[test]
    fn given_a_word_that_is_none_when_read_then_that_is_told_and_the_node_is_seen() {
        for wrong in ["", "client", "Preserve", "true"] {
            let (source, problems) = read(wrong);
            assert_eq!((source, problems.len()), (SourceAddress::Node, 1), "{wrong:?}");
        }
        assert_eq!(
            read("client").1,
            [
                r#"Service default/web: annotation kube-relay.dev/source-address: "client" is not used: write preserve or node"#
            ]
        );
    }
}
