//! Addresses: each test has a corner of 127/8 to itself, so that tests run side by side on fixed ports.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::OnceLock;

/// The port of every Service here. Below the range from which the kernel takes source ports.
pub const SERVICE_PORT: u16 = 8080;
/// The port of every backend here.
pub const BACKEND_PORT: u16 = 8000;
/// The node port of every Service here that has one.
pub const NODE_PORT: u16 = 30000;

/// The corner of one test: `127.BLOCK.NUMBER.*`.
#[derive(Clone, Copy, Debug)]
pub struct Site(u8);

impl Site {
    /// The corner with a number: the T-number of the test's case, or one below 100 that no other test has.
    pub const fn new(number: u8) -> Self {
        Self(number)
    }

    /// The first cluster IP.
    pub fn cluster_ip(self) -> IpAddr {
        self.at(10)
    }

    /// Where the Service at the first cluster IP answers.
    pub fn service(self) -> SocketAddr {
        SocketAddr::new(self.cluster_ip(), SERVICE_PORT)
    }

    /// The address that node ports are served on.
    pub fn node_ip(self) -> IpAddr {
        self.at(1)
    }

    /// Where the Service answers at its node port.
    pub fn node_port(self) -> SocketAddr {
        SocketAddr::new(self.node_ip(), NODE_PORT)
    }

    /// A backend, from 1.
    pub fn backend(self, number: u8) -> SocketAddr {
        SocketAddr::new(self.at(100 + number), BACKEND_PORT)
    }

    /// An address for a client, from 1.
    pub fn client(self, number: u8) -> IpAddr {
        self.at(200 + number)
    }

    fn at(self, last: u8) -> IpAddr {
        Ipv4Addr::new(127, block(), self.0, last).into()
    }
}

/// The second octet, held by this process: two checkouts may run their tests on one machine.
fn block() -> u8 {
    static BLOCK: OnceLock<(u8, TcpListener)> = OnceLock::new();
    let (block, _claim) = BLOCK.get_or_init(|| {
        (160..=250)
            .find_map(|block| Some((block, TcpListener::bind((Ipv4Addr::new(127, block, 0, 1), 20127)).ok()?)))
            .expect("one of 91 blocks of loopback addresses is free")
    });
    *block
}
