//! The tables and chains of nftables in this network namespace, asked of the kernel: no `nft` program is needed.
//!
//! Only names: whose rules they are is told in `proxies`. The kernel wants CAP_NET_ADMIN for the answer, and may load its
//! own part for nftables where that is a module.

use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;

use super::fact::{Fact, Unreadable};

/// Netlink's protocol for netfilter (`NETLINK_NETFILTER`).
const NETFILTER: isize = 12;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of each message's type.
const NFTABLES: u16 = 10 << 8;
/// `NFT_MSG_GETTABLE` and `NFT_MSG_GETCHAIN`: what is asked.
const GET_TABLES: u16 = NFTABLES | 1;
const GET_CHAINS: u16 = NFTABLES | 4;
/// `NFT_MSG_NEWTABLE` and `NFT_MSG_NEWCHAIN`: what is answered.
const TABLE: u16 = NFTABLES;
const CHAIN: u16 = NFTABLES | 3;
/// `NFTA_TABLE_NAME` and `NFTA_CHAIN_TABLE` are both 1, `NFTA_CHAIN_NAME` is 3.
const TABLE_NAME: u16 = 1;
const CHAIN_NAME: u16 = 3;
const END: u16 = libc::NLMSG_DONE as u16;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
/// Length of a message's header, and of what netfilter puts behind it (`struct nfgenmsg`).
const HEADER: usize = 16;
const OWN_HEADER: usize = 4;
/// The kernel fills no larger datagram.
const DATAGRAM: usize = 32 * 1024;

/// A table or a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Of the table.
    pub(super) table: String,
    /// `None` for the table itself.
    pub(super) chain: Option<String>,
}

/// All tables, then all chains; `None`: this kernel has no nftables.
pub(super) fn read() -> Fact<Option<Vec<Named>>> {
    let unreadable = |error: Errno| match error {
        Errno::PERM => Unreadable::new("the rules of nftables", "they are told with CAP_NET_ADMIN only"),
        other => Unreadable::new("the rules of nftables", other),
    };
    match ask(GET_TABLES).and_then(|tables| Ok([tables, ask(GET_CHAINS)?].concat())) {
        Ok(named) => Ok(Some(named)),
        Err(error) if is_missing(error) => Ok(None),
        Err(error) => Err(unreadable(error)),
    }
}

/// True where the kernel has no such netlink, or no nftables behind it.
fn is_missing(error: Errno) -> bool {
    matches!(error, Errno::PROTONOSUPPORT | Errno::OPNOTSUPP | Errno::INVAL | Errno::AFNOSUPPORT)
}

fn ask(what: u16) -> Result<Vec<Named>, Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let mut socket = Socket::new(NETFILTER).map_err(errno)?;
    socket.bind(&SocketAddr::new(0, 0)).map_err(errno)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(errno)?;
    socket.send(&request(what), 0).map_err(errno)?;
    let (mut named, mut buffer) = (Vec::new(), vec![0; DATAGRAM]);
    loop {
        // The kernel has answered before the call to send returned, and goes on with each that receives.
        let length = socket.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT).map_err(errno)?;
        if take(&buffer[..length.min(DATAGRAM)], &mut named)? {
            return Ok(named);
        }
    }
}

/// Asks for all of a kind, of all families.
fn request(what: u16) -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let mut request = Vec::with_capacity(HEADER + OWN_HEADER);
    request.extend(((HEADER + OWN_HEADER) as u32).to_ne_bytes());
    request.extend(what.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend([0; 8]); // A number for the answer, and whose: it is the only one on its socket.
    request.extend([0; OWN_HEADER]); // Family 0 is each.
    request
}

/// Takes the names out of a datagram; true where it was the last one.
fn take(mut datagram: &[u8], named: &mut Vec<Named>) -> Result<bool, Errno> {
    while let Some((kind, body, rest)) = message(datagram) {
        match kind {
            END => return Ok(true),
            ERROR => {
                let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(Errno::from_raw_os_error(
                    code.checked_neg().filter(|code| (1..4096).contains(code)).unwrap_or(5),
                ));
            }
            TABLE | CHAIN => named.extend(name(kind, body)),
            _ => {}
        }
        datagram = rest;
    }
    Ok(false)
}

/// The first message: its type, what is behind its header, and what follows it.
fn message(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
    let body = datagram.get(HEADER..length)?;
    Some((kind, body, datagram.get(aligned(length)..).unwrap_or_default()))
}

fn name(kind: u16, body: &[u8]) -> Option<Named> {
    let attributes = body.get(OWN_HEADER..)?;
    let table = attribute(attributes, TABLE_NAME)?;
    let chain = if kind == CHAIN { Some(attribute(attributes, CHAIN_NAME)?) } else { None };
    Some(Named { table, chain })
}

/// A text among attributes, each of which begins with its length and its type.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<String> {
    const NESTED_OR_ORDERED: u16 = 0xC000;
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?) & !NESTED_OR_ORDERED;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            let text = value.split(|byte| *byte == 0).next()?;
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        attributes = attributes.get(aligned(length)..)?;
    }
}

/// What begins on a boundary of four bytes.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(kind: u16, value: &str) -> Vec<u8> {
        let mut bytes = [((4 + value.len() + 1) as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value.bytes().chain([0]));
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn told(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    fn chain() -> Vec<u8> {
        let body = [vec![2, 0, 0, 0], text(TABLE_NAME, "nat"), text(2, "handle"), text(CHAIN_NAME, "KUBE-SERVICES")];
        told(CHAIN, &body.concat())
    }

    #[test]
    fn given_answers_of_the_kernel_when_taken_then_tables_and_chains_are_named() {
        let table = told(TABLE, &[vec![1, 0, 0, 0], text(TABLE_NAME, "kube-proxy")].concat());
        let mut named = Vec::new();

        assert_eq!(take(&[table, chain()].concat(), &mut named), Ok(false));
        assert_eq!(take(&told(END, &[0; 4]), &mut named), Ok(true));

        let of = |table: &str, chain: Option<&str>| Named { table: table.into(), chain: chain.map(Into::into) };
        assert_eq!(named, [of("kube-proxy", None), of("nat", Some("KUBE-SERVICES"))]);
    }

    #[test]
    fn given_a_refusal_when_taken_then_its_reason_is_told() {
        let refusal = |code: i32| take(&told(ERROR, &code.to_ne_bytes()), &mut Vec::new());

        assert_eq!(refusal(-1), Err(Errno::PERM));
        for odd in [0, i32::MIN, -5_000, 7] {
            assert_eq!(refusal(odd), Err(Errno::IO));
        }
    }

    #[test]
    fn given_bytes_that_are_cut_or_wrong_when_taken_then_nothing_panics() {
        let whole = chain();
        for length in 0..whole.len() {
            assert_eq!(take(&whole[..length], &mut Vec::new()), Ok(false));
        }
        for place in 0..whole.len() {
            for byte in [0, 1, 3, 255] {
                let mut wrong = whole.clone();
                wrong[place] = byte;
                let _ = take(&wrong, &mut Vec::new());
            }
        }
    }

    #[test]
    fn given_this_machine_when_asked_then_there_is_an_answer_or_a_reason() {
        if let Err(why) = read() {
            assert!(why.to_string().starts_with("the rules of nftables: "), "{why}");
        }
    }
}
