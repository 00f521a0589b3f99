//! Three nodes with a relay each and addresses that are local by its routes alone: who answers whom, at which node.
//!
//! One node, with what changes under open connections, is in `verdicts`; addresses that are not the Service's are in
//! `strangers`.

use std::thread;

use crate::cluster::{Answer, Cluster};
use crate::rig::{Case, Namespace, Rig, Shape};
use crate::stage::{Backends, ClusterIp, ENTRIES, Entry, ExternalIp, LoadBalancerIp, NodePort, Pod, Web};
use crate::verdicts::ranges;

use Answer::{By, Refused, Silence};
use Who::{Client, Node, PodOf};

pub(crate) const CASES: &[Case] = cases![
    t093_to_t096_t101_to_t104_t106_t115_t125_given_three_nodes_when_pods_come_and_go_then_each_node_leads_to_all_of_them,
    t107_to_t110_given_source_ranges_when_asked_at_each_node_then_the_load_balancer_ip_alone_is_silent_to_others,
    t112_to_t114_given_local_policies_when_asked_at_each_node_then_each_has_its_own_pods,
    t116_to_t121_given_terminating_pods_when_asked_at_each_node_then_each_falls_back_for_itself,
];

/// A state of the Service, and what everybody meets then.
struct Story {
    told: &'static str,
    internal_policy: &'static str,
    external_policy: &'static str,
    /// From `loadBalancerSourceRanges`.
    allowed: &'static [Who],
    /// Endpoints: `pod1-0` is on node 1; behind some is how they are.
    pods: &'static [&'static str],
    ways: &'static [Way],
}

/// With nothing set.
const PLAIN: Story = Story { told: "", internal_policy: "", external_policy: "", allowed: &[], pods: &[], ways: &[] };

/// Who asks, at which node, at which entries, and what comes of it. An address of a Service is local on each node, so that
/// nodes and pods ask at their own one.
type Way = (Who, usize, &'static [Entry], Answer);

/// Who asks.
#[derive(Clone, Copy, Debug)]
enum Who {
    /// A machine off the nodes.
    Client,
    /// A process of a node.
    Node(usize),
    /// The first pod of a node.
    PodOf(usize),
}

const ALL: &[Entry] = &ENTRIES;
const EXTERNAL: &[Entry] = &[ExternalIp, LoadBalancerIp, NodePort];
const LOAD_BALANCER: &[Entry] = &[LoadBalancerIp];
const CLUSTER_IP: &[Entry] = &[ClusterIp];
const NODE_PORTS: &[Entry] = &[NodePort];

fn t093_to_t096_t101_to_t104_t106_t115_t125_given_three_nodes_when_pods_come_and_go_then_each_node_leads_to_all_of_them()
 {
    const EACH: Answer = By(&["pod0-0", "pod1-0", "pod2-0"]);
    const FAR: Answer = By(&["pod2-0", "pod2-1"]);
    play(&[
        Story { told: "nobody is there yet (T093, T095)", ways: const { &everywhere(Refused) }, ..PLAIN },
        Story {
            told: "a pod on each node (T094, T096, T103, T104, T106, T115, T126)",
            pods: &["pod0-0", "pod1-0", "pod2-0"],
            ways: const { &everywhere(EACH) },
            ..PLAIN
        },
        Story {
            told: "pods on node 2 alone: the others' addresses and node ports lead there as well (T104, T106)",
            pods: &["pod2-0", "pod2-1"],
            ways: const { &everywhere(FAR) },
            ..PLAIN
        },
        Story {
            told: "a pod that asks its own Service is answered by itself, also by way of another node (T101, T102)",
            pods: &["pod1-0"],
            ways: &[(PodOf(1), 1, ALL, By(&["pod1-0"])), (PodOf(1), 0, NODE_PORTS, By(&["pod1-0"]))],
            ..PLAIN
        },
        Story {
            told: "all were evicted, and the slices are empty (T094, T125)",
            ways: const { &everywhere(Refused) },
            ..PLAIN
        },
    ]);
}

/// All who may ask, at each node.
const fn everywhere(answer: Answer) -> [Way; 9] {
    [
        (Client, 0, ALL, answer),
        (Client, 1, ALL, answer),
        (Client, 2, ALL, answer),
        (PodOf(0), 0, ALL, answer),
        (PodOf(1), 1, ALL, answer),
        (Node(0), 0, ALL, answer),
        (Node(2), 2, ALL, answer),
        (PodOf(0), 2, NODE_PORTS, answer),
        (Node(0), 1, NODE_PORTS, answer),
    ]
}

fn t107_to_t110_given_source_ranges_when_asked_at_each_node_then_the_load_balancer_ip_alone_is_silent_to_others() {
    const PODS: &[&str] = &["pod0-0", "pod2-0"];
    const OPEN: &[Entry] = &[ClusterIp, ExternalIp, NodePort];
    play(&[
        Story {
            told: "the client may, and node 1 (T107, T109, T110)",
            allowed: &[Client, Node(1)],
            pods: PODS,
            ways: &[
                (Client, 0, ALL, By(PODS)),
                (Client, 1, ALL, By(PODS)),
                (Node(1), 1, ALL, By(PODS)),
                (Node(2), 2, LOAD_BALANCER, Silence),
                (Node(2), 2, OPEN, By(PODS)),
                (PodOf(0), 0, LOAD_BALANCER, Silence),
                (PodOf(0), 0, OPEN, By(PODS)),
            ],
            ..PLAIN
        },
        Story {
            told: "a pod may, and the client no more (T107, T108, T111)",
            allowed: &[PodOf(2)],
            pods: PODS,
            ways: &[
                (Client, 1, LOAD_BALANCER, Silence),
                (Client, 1, OPEN, By(PODS)),
                (PodOf(2), 2, ALL, By(PODS)),
                (PodOf(1), 1, LOAD_BALANCER, Silence),
            ],
            ..PLAIN
        },
    ]);
}

fn t112_to_t114_given_local_policies_when_asked_at_each_node_then_each_has_its_own_pods() {
    const EACH: &[&str] = &["pod0-0", "pod1-0", "pod2-0"];
    const NEAR: &[&str] = &["pod0-0", "pod0-1"];
    const TWO: &[&str] = &["pod0-0", "pod2-0"];
    play(&[
        Story {
            told: "internal policy Local, a pod on each node (T112)",
            internal_policy: "Local",
            pods: EACH,
            ways: &[
                (PodOf(0), 0, CLUSTER_IP, By(&["pod0-0"])),
                (Node(1), 1, CLUSTER_IP, By(&["pod1-0"])),
                (Client, 2, CLUSTER_IP, By(&["pod2-0"])),
                (Client, 2, EXTERNAL, By(EACH)),
            ],
            ..PLAIN
        },
        Story {
            told: "internal policy Local, pods on node 0 alone (T112)",
            internal_policy: "Local",
            pods: NEAR,
            ways: &[
                (PodOf(0), 0, CLUSTER_IP, By(NEAR)),
                (PodOf(1), 1, CLUSTER_IP, Silence),
                (Client, 2, CLUSTER_IP, Silence),
                (PodOf(1), 1, EXTERNAL, By(NEAR)),
            ],
            ..PLAIN
        },
        Story {
            told: "internal policy Local, no pods any more (T112)",
            internal_policy: "Local",
            ways: &[(PodOf(0), 0, CLUSTER_IP, Refused), (Client, 1, CLUSTER_IP, Refused)],
            ..PLAIN
        },
        Story {
            told: "external policy Local: outsiders get the node's own, nodes and pods get all (T113, T114)",
            external_policy: "Local",
            pods: TWO,
            ways: &[
                (Client, 0, EXTERNAL, By(&["pod0-0"])),
                (Client, 2, EXTERNAL, By(&["pod2-0"])),
                (Client, 1, EXTERNAL, Silence),
                (Client, 1, CLUSTER_IP, By(TWO)),
                (PodOf(0), 0, ALL, By(TWO)),
                (PodOf(1), 1, ALL, By(TWO)),
                (Node(2), 2, ALL, By(TWO)),
                (Node(1), 1, ALL, By(TWO)),
                (PodOf(0), 1, NODE_PORTS, By(TWO)),
                // At another node, a node is an outsider.
                (Node(0), 2, NODE_PORTS, By(&["pod2-0"])),
                (Node(0), 1, NODE_PORTS, Silence),
            ],
            ..PLAIN
        },
        Story {
            told: "external policy Local, no pods any more (T093)",
            external_policy: "Local",
            ways: &[(Client, 0, EXTERNAL, Refused), (PodOf(1), 1, EXTERNAL, Refused)],
            ..PLAIN
        },
    ]);
}

fn t116_to_t121_given_terminating_pods_when_asked_at_each_node_then_each_falls_back_for_itself() {
    const EXTERNAL_LOCAL: Story = Story { external_policy: "Local", ..PLAIN };
    play(&[
        Story {
            told: "two ready ones and a terminating one on node 0 (T116)",
            pods: &["pod0-0", "pod0-1", "pod0-2 terminating", "pod1-0"],
            ways: &[
                (Client, 0, LOAD_BALANCER, By(&["pod0-0", "pod0-1"])),
                (Client, 1, LOAD_BALANCER, By(&["pod1-0"])),
                (Client, 2, LOAD_BALANCER, Silence),
                (PodOf(2), 2, CLUSTER_IP, By(&["pod0-0", "pod0-1", "pod1-0"])),
            ],
            ..EXTERNAL_LOCAL
        },
        Story {
            told: "on node 0 only a terminating one (T117)",
            pods: &["pod0-0 terminating", "pod1-0"],
            ways: &[
                (Client, 0, LOAD_BALANCER, By(&["pod0-0"])),
                (Client, 1, LOAD_BALANCER, By(&["pod1-0"])),
                (PodOf(0), 0, CLUSTER_IP, By(&["pod1-0"])),
                (PodOf(2), 2, CLUSTER_IP, By(&["pod1-0"])),
            ],
            ..EXTERNAL_LOCAL
        },
        Story {
            told: "on node 0 only one that serves no more (T118)",
            pods: &["pod0-0 ended", "pod1-0"],
            ways: &[(Client, 0, LOAD_BALANCER, Silence), (PodOf(0), 0, CLUSTER_IP, By(&["pod1-0"]))],
            ..EXTERNAL_LOCAL
        },
        Story {
            told: "all end, and one of them still serves, on node 1 (T119, T120)",
            pods: &["pod1-0 terminating", "pod1-1 ended"],
            ways: &[
                (Client, 0, LOAD_BALANCER, Silence),
                (Client, 1, LOAD_BALANCER, By(&["pod1-0"])),
                (PodOf(0), 0, CLUSTER_IP, By(&["pod1-0"])),
                (PodOf(1), 1, CLUSTER_IP, By(&["pod1-0"])),
                (Client, 2, CLUSTER_IP, By(&["pod1-0"])),
            ],
            ..EXTERNAL_LOCAL
        },
        Story {
            told: "one that ends is published all the same (T121)",
            pods: &["pod1-0 published"],
            ways: &[(PodOf(0), 0, ALL, By(&["pod1-0"])), (Client, 2, ALL, By(&["pod1-0"]))],
            ..PLAIN
        },
        Story {
            told: "and published no more (T121)",
            pods: &["pod1-0 ended"],
            ways: &[(PodOf(0), 0, ALL, Refused), (Client, 2, ALL, Refused)],
            ..PLAIN
        },
    ]);
}

/// Tells stories one after the other, to the same relays.
fn play(stories: &[Story]) {
    let rig = Rig::build(Shape::default()).expect("the rig builds");
    let _running = Backends::start((0..3).flat_map(|i| rig.pods(i)));
    let first = stories.first().map(|story| story.manifests(&rig)).unwrap_or_default();
    let cluster = Cluster::start(rig, &first, |command| {
        command.args(["--nodeport-addresses", "primary"]);
    });
    for story in stories {
        cluster.change(&story.manifests(&cluster.rig));
        let expect = |(who, node, entries, answer): &Way| {
            let what = format!("{}: {who:?}", story.told);
            cluster.expect(who.part(&cluster.rig), *node, entries, *answer, &what);
        };
        // Who gets no answer waits for it. The client is led to one node after the other.
        let waits = |way: &&Way| matches!(way, (Node(_) | PodOf(_), _, _, Silence));
        thread::scope(|scope| {
            for way in story.ways.iter().filter(waits) {
                scope.spawn(move || expect(way));
            }
            for way in story.ways.iter().filter(|way| !waits(way)) {
                if let (Client, node, ..) = way {
                    cluster.lead_to(*node);
                }
                expect(way);
            }
        });
    }
}

impl Story {
    fn manifests(&self, rig: &Rig) -> String {
        let allowed: Vec<&Namespace> = self.allowed.iter().map(|who| who.part(rig)).collect();
        let web = Web {
            internal_policy: self.internal_policy,
            external_policy: self.external_policy,
            source_ranges: ranges(&allowed),
            ..Web::default()
        };
        web.with(self.pods.iter().map(|pod| endpoint(rig, pod)).collect::<Vec<_>>()).to_string()
    }
}

impl Who {
    fn part(self, rig: &Rig) -> &Namespace {
        match self {
            Client => rig.client(),
            Node(i) => rig.node(i),
            PodOf(i) => rig.pod(i, 0),
        }
    }
}

/// `pod1-0`, or `pod1-0 terminating`.
fn endpoint(rig: &Rig, text: &str) -> Pod {
    let (name, state) = text.split_once(' ').unwrap_or((text, ""));
    let numbers = name.strip_prefix("pod").and_then(|numbers| numbers.split_once('-')).expect("podI-J");
    let [i, j] = [numbers.0, numbers.1].map(|number| number.parse().expect("a number"));
    let pod = Pod::of(rig, i, j);
    match state {
        "" => pod,
        "terminating" => pod.terminating(),
        "ended" => pod.ended(),
        "published" => pod.published(),
        other => panic!("no pod is {other}"),
    }
}
