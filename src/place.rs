//! Where a relay is: its flags and its machine, and what follows of them for the plan.
//!
//! Pure but for [`follow`]. What a cluster adds is in `own_node`.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::PlanConfig;
use crate::control::{Message, Setting};
use crate::host_watch::Hosts;

/// The place of a relay.
#[derive(Clone, Debug)]
pub struct Place {
    /// From the flags.
    pub plan: PlanConfig,
    /// This machine, as it is at each moment.
    pub hosts: Hosts,
}

impl Place {
    /// What shapes the plan here and now.
    pub fn setting(&self) -> Setting {
        let host = self.hosts.now();
        Setting { plan: self.plan.resolve(&host), inside: self.plan.inside(&host), local: host.addresses() }
    }
}

/// Has a relay that no cluster says anything to follow its machine, until `cancel` or until nobody listens.
pub async fn follow(mut place: Place, messages: mpsc::Sender<Message>, cancel: CancellationToken) {
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            _ = place.hosts.changed() => {}
        }
        if messages.send(Message::Setting(Box::new(place.setting()))).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::host::{Host, InterfaceAddress, NodePortSelector};

    fn plan() -> PlanConfig {
        PlanConfig::with_node_ports(vec![NodePortSelector::Cidr("10.0.0.0/8".parse().expect("a network"))])
    }

    fn host(addresses: &[[u8; 4]]) -> Host {
        let found = |address: &[u8; 4]| InterfaceAddress {
            interface: "eth0".into(),
            address: IpAddr::from(*address),
            prefix: 24,
        };
        Host { interfaces: addresses.iter().map(found).collect(), default_sources: vec![] }
    }

    #[tokio::test]
    async fn t219_f31_given_a_place_when_its_machine_changes_then_the_relay_is_told_what_follows() {
        let (change, hosts) = Hosts::by_hand(host(&[[10, 0, 0, 5]]));
        let (messages, mut inbox) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let place = Place { plan: plan(), hosts };
        assert_eq!(place.setting().plan.node_port_addresses, [IpAddr::from([10, 0, 0, 5])]);
        let following = tokio::spawn(follow(place, messages, cancel.clone()));

        for now in [vec![], vec![[10, 0, 0, 6], [192, 0, 2, 1], [10, 0, 0, 6]]] {
            change(host(&now));
            let Some(Message::Setting(setting)) = inbox.recv().await else { panic!("it is told") };

            let own: Vec<IpAddr> = now.iter().take(2).copied().map(IpAddr::from).collect();
            assert_eq!(setting.plan.node_port_addresses, own.iter().take(1).copied().collect::<Vec<_>>());
            assert_eq!(setting.plan.node_addresses, own, "each once: an external IP may take none of them");
            assert!(own.iter().all(|ip| setting.inside.contains(&(*ip).into()) && setting.local.contains(ip)));
        }
        cancel.cancel();
        following.await.expect("it ends");
    }
}
