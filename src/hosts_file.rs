//! Names of Services as lines of a hosts file, for machines that ask no DNS server of ours.
//!
//! Pure. Names are those that a pod may say: what its resolver would add is written out. A hosts file has addresses
//! only; ports and aliases need a zone (`dns_zone`).

use crate::dns_records::{Record, RecordValue, Records};

/// The lines for a pod of a namespace, whose own Services have the shortest names.
pub fn text(records: &Records, domain: &str, namespace: &str) -> String {
    records.records.iter().filter_map(|record| line(record, domain, namespace)).collect()
}

fn line(Record { owner, value }: &Record, domain: &str, namespace: &str) -> Option<String> {
    match value {
        RecordValue::Address(ip) => {
            let short = short_names(owner, namespace).join(" ");
            Some(format!("{ip} {owner}.{domain} {short}\n"))
        }
        RecordValue::Alias(target) => {
            Some(format!("# {owner}.{domain} is another name of {target} which a hosts file cannot say\n"))
        }
        RecordValue::Port { .. } => None,
    }
}

/// `web.default.svc`, `web.default`, and in namespace `default` also `web`. Not `localhost`, which is each machine's own
/// whatever Services are called.
fn short_names<'o>(owner: &'o str, namespace: &str) -> Vec<&'o str> {
    let without_svc = owner.strip_suffix(".svc");
    let own = without_svc.and_then(|name| name.strip_suffix(namespace)?.strip_suffix('.'));
    let own = own.filter(|name| *name != "localhost");
    [Some(owner), without_svc, own].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(owner: &str, value: RecordValue) -> Record {
        Record { owner: owner.into(), value }
    }

    #[test]
    fn given_records_when_written_for_a_namespace_then_each_address_has_the_names_that_its_pods_may_say() {
        let records = vec![
            record("web.default.svc", RecordValue::Address([10, 96, 0, 1].into())),
            record("_http._tcp.web.default.svc", RecordValue::Port { port: 80, target: "web.default.svc".into() }),
            record("cart.shop.svc", RecordValue::Address("fd00::2".parse().expect("an address"))),
            record("db-0.db.shop.svc", RecordValue::Address([10, 244, 0, 5].into())),
            record("mail.shop.svc", RecordValue::Alias("mail.example.".into())),
            record("x.workshop.svc", RecordValue::Address([10, 96, 0, 3].into())),
            record("localhost.shop.svc", RecordValue::Address([10, 96, 0, 4].into())),
        ];

        let text = text(&Records { records, ..Records::default() }, "cluster.local", "shop");

        assert_eq!(
            text,
            "\
10.96.0.1 web.default.svc.cluster.local web.default.svc web.default
fd00::2 cart.shop.svc.cluster.local cart.shop.svc cart.shop cart
10.244.0.5 db-0.db.shop.svc.cluster.local db-0.db.shop.svc db-0.db.shop db-0.db
# mail.shop.svc.cluster.local is another name of mail.example. which a hosts file cannot say
10.96.0.3 x.workshop.svc.cluster.local x.workshop.svc x.workshop
10.96.0.4 localhost.shop.svc.cluster.local localhost.shop.svc localhost.shop
"
        );
    }
}
