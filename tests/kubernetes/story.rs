//! The example `manage`: each of its steps fails unless watch and client see it.

use std::net::IpAddr;

use crate::support::site::Site;

#[path = "../../examples/manage.rs"]
#[allow(dead_code, unreachable_pub, clippy::duplicate_mod, reason = "its `main` is not run here, and it is a program")]
mod manage;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_an_api_server_when_a_service_lives_its_life_then_watch_and_client_see_each_step() {
    let IpAddr::V4(place) = Site::new(95).node_ip() else { panic!("sites are in 127/8") };
    let [a, b, c, _] = place.octets();

    manage::play_alone([a, b, c]).await.expect("the story to its end");
}
