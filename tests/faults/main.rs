//! kube-relay in a network of its own, under loads and faults that need one, and with the programs that people use.
//!
//! Needs namespaces (no root where the kernel gives them to everyone); skips with the reason otherwise.

mod backends;
mod bursts;
mod clocks;
mod databases;
mod families;
mod floods;
mod front;
mod headers;
mod many;
mod memory;
mod programs;
mod readers;
mod restarts;
mod rollout;
mod scrapes;
mod soak;
mod spoofed;
mod stage;
mod storms;
mod syns;

#[path = "../support/rig.rs"]
mod rig;
#[path = "../support/seen.rs"]
#[allow(dead_code)] // as is the next: others use more of it
mod seen;
#[path = "../support/workload.rs"]
#[allow(dead_code)]
mod workload;

use std::process::ExitCode;

fn main() -> ExitCode {
    // Of a debug build in the short form nobody takes figures: these show that none fails.
    if cfg!(debug_assertions) && !rig::full() {
        rig::run(&[FOR_FIGURES, SIDE_BY_SIDE].concat(), MEASURING)
    } else {
        rig::run(SIDE_BY_SIDE, &[MEASURING, FOR_FIGURES].concat())
    }
}

/// Nobody else is to take a processor: times or losses are judged.
const MEASURING: &[rig::Case] = &[
    (
        "f07_t161_given_a_backend_that_refuses_when_clients_come_then_none_fails_and_a_retry_costs_next_to_nothing",
        backends::one_refuses,
    ),
    (
        "f08_t162_given_a_black_hole_when_clients_come_then_none_waits_longer_than_300_ms_and_soon_none_at_all",
        backends::one_is_a_black_hole,
    ),
    (
        "f06_given_rolling_updates_of_100_endpoints_a_second_when_1000_clients_a_second_come_then_none_fails",
        rollout::no_client_notices,
    ),
    (
        "f21_given_a_relay_under_load_when_it_is_killed_and_started_anew_then_all_is_served_within_half_a_second",
        restarts::killed_and_started_anew,
    ),
    ("f27_given_2000_short_connections_a_second_when_relayed_then_none_fails", bursts::none_fails),
    (
        "f16_given_a_full_queue_to_the_backend_when_sent_to_then_the_lost_are_counted_and_the_flow_lives",
        floods::queue_is_full,
    ),
    (
        "f18_given_a_sweep_of_spoofed_sources_when_they_flood_then_flows_are_bounded_and_others_served",
        floods::sources_are_spoofed,
    ),
    (
        "f07_given_an_ejected_backend_when_it_comes_back_then_a_client_finds_it_within_its_ten_seconds",
        backends::one_comes_back,
    ),
    (
        "f23_given_streams_and_new_clients_when_a_relay_is_asked_to_end_then_it_serves_closes_drains_and_cuts_in_this_order",
        restarts::drained,
    ),
    ("given_iperf3_when_it_measures_through_the_relay_then_both_directions_move", programs::iperf3),
    ("given_wrk_and_nginx_when_relayed_then_no_request_fails", programs::wrk),
    ("given_dnsperf_and_a_dns_server_when_relayed_then_no_query_is_lost", programs::dnsperf),
];

/// The same where figures are taken. Otherwise no time is judged, or with much to spare, and they may have company. What takes
/// longest begins first.
const FOR_FIGURES: &[rig::Case] = &[
    ("f22_given_64_mib_when_ever_more_clients_come_then_they_wait_and_nobody_ends_the_relay", memory::is_short),
    (
        "f34_given_ordinary_work_for_a_long_time_when_it_is_over_then_descriptors_and_memory_are_as_before",
        soak::nothing_stays,
    ),
    (
        "f08_t165_given_a_single_backend_that_is_far_away_when_clients_come_then_each_is_served_and_it_is_never_ejected",
        backends::a_single_one_is_far,
    ),
    (
        "f26_given_machines_that_started_at_other_times_when_relayed_then_what_lasts_for_a_time_lasts_as_long",
        clocks::nothing_depends_on_them,
    ),
    ("f30_given_a_log_that_nobody_reads_when_the_relay_is_asked_to_end_then_it_does", storms::nobody_reads_the_end),
    (
        "f09_given_syns_of_nobody_at_one_service_when_clients_come_to_another_then_they_notice_nothing",
        syns::one_service_is_flooded,
    ),
    (
        "f11_given_clients_that_read_nothing_when_others_come_then_these_do_not_wait_and_each_stalled_one_costs_little",
        readers::nobody_waits_for_them,
    ),
    (
        "f24_given_100000_backends_when_metrics_are_read_all_the_time_then_each_page_is_soon_there_and_no_client_waits",
        scrapes::nobody_waits_for_it,
    ),
    (
        "f30_given_a_thousand_failures_a_second_when_nobody_reads_the_log_then_no_client_waits_and_the_log_stays_short",
        storms::nobody_reads,
    ),
    (
        "f15_given_all_source_ports_to_three_backends_in_use_when_more_clients_come_then_they_are_told_at_once_and_nothing_spins",
        bursts::ports_of_each_backend_are_used,
    ),
];

/// These judge no time.
const SIDE_BY_SIDE: &[rig::Case] = &[
    (
        "given_haproxy_before_three_nodes_when_one_is_drained_then_no_client_notices",
        front::haproxy_asks_before_each_node_ends,
    ),
    (
        "given_nginx_before_three_nodes_when_one_is_taken_out_and_drained_then_no_client_notices",
        front::nginx_is_told_before_a_node_ends,
    ),
    (
        "t178_given_services_of_both_families_when_clients_come_then_each_reaches_a_backend_of_its_family",
        families::each_reaches_its_own,
    ),
    (
        "t171_given_a_mariadb_that_fails_over_when_old_sessions_are_to_end_then_they_do_and_else_they_never_do",
        databases::mariadb_fails_over,
    ),
    (
        "f33_given_a_client_of_session_affinity_when_all_other_endpoints_are_replaced_all_the_time_then_it_stays",
        rollout::a_sticky_client_stays,
    ),
    ("f23_given_a_relay_that_is_asked_to_end_when_it_is_asked_again_then_it_does_so_now", restarts::asked_twice),
    ("t126_given_nginx_behind_the_relay_when_it_gets_headers_then_it_logs_the_client", headers::nginx_logs_the_client),
    (
        "t126_given_mariadb_behind_the_relay_when_it_gets_headers_then_it_logs_the_client",
        headers::mariadb_logs_the_client,
    ),
    (
        "t126_given_haproxy_in_front_when_it_sends_headers_then_its_clients_are_known_and_nobody_else_is_believed",
        headers::haproxy_in_front_names_the_client,
    ),
];
