//! Who needs answers to clients' addresses led here: several relays of a network namespace may have one number, as while one
//! takes over from another, and what leads answers is of all of them.
//!
//! Who needs it holds a seat, and who takes it away holds all of them. Each seat is a claim (`route_claim`): it ends with its
//! process, and says who that is. Two that want to take it away in the same moment both leave it.

use std::convert::Infallible;

use crate::route_claim::{Claim, ClaimError};

/// Relays of one number that can need it at once. One more has no say when another takes it away: it is made again then.
const SEATS: usize = 8;

/// That nobody else takes away what leads answers here. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    number: usize,
    claim: Claim,
}

impl Seat {
    /// Takes a free one. `of_routes` is the name of the claim to routes, beside which these are; `says` is told to whoever
    /// comes later.
    pub(crate) async fn take(of_routes: &str, protocol: u8, says: &str) -> Result<Self, ClaimError> {
        let mut number = 0;
        loop {
            match claim(of_routes, number, protocol, says).await {
                Ok(claim) => return Ok(Self { number, claim }),
                Err(ClaimError::Held { .. }) if number + 1 < SEATS => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells everybody who asks who holds it, for ever.
    pub(crate) async fn answer(&self) -> Infallible {
        self.claim.answer().await
    }
}

/// All seats, but for one that is ours already: while these are held, nobody needs what leads answers here.
///
/// # Errors
/// Where somebody needs it, or there are no such sockets.
pub(crate) async fn take_all(
    of_routes: &str,
    protocol: u8,
    says: &str,
    ours: Option<&Seat>,
) -> Result<Vec<Claim>, ClaimError> {
    let mut claims = Vec::with_capacity(SEATS);
    for number in (0..SEATS).filter(|number| ours.is_none_or(|seat| seat.number != *number)) {
        claims.push(claim(of_routes, number, protocol, says).await?);
    }
    Ok(claims)
}

async fn claim(of_routes: &str, number: usize, protocol: u8, says: &str) -> Result<Claim, ClaimError> {
    Claim::take_named(&format!("{of_routes}/replies/{number}"), protocol, says.into()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of this process: others test at the same time, in the same network namespace.
    fn name(test: &str) -> String {
        format!("kube-relay/test/{}/seats/{test}", std::process::id())
    }

    #[tokio::test]
    async fn given_two_that_need_it_when_one_or_the_other_ends_then_it_is_not_taken_from_the_one_that_is_left() {
        let name = name("two");
        let take = || Seat::take(&name, 252, "a relay");
        let (first, second) = (take().await.expect("a seat"), take().await.expect("another one"));
        assert_ne!(first.number, second.number);

        take_all(&name, 252, "the first", Some(&first)).await.expect_err("the second one needs it");
        take_all(&name, 252, "the second", Some(&second)).await.expect_err("so does the first one");
        drop(first);

        take_all(&name, 252, "a cleanup", None).await.expect_err("the second one still does");
        let all = take_all(&name, 252, "the second", Some(&second)).await.expect("nobody else does");
        assert_eq!(all.len(), SEATS - 1);
    }

    #[tokio::test]
    async fn given_a_seat_when_somebody_wants_all_then_it_is_told_who_holds_it() {
        let name = name("told");
        let seat = Seat::take(&name, 252, "kube-relay with pid 4711").await.expect("a seat");
        tokio::spawn(async move { seat.answer().await });

        let error = take_all(&name, 252, "a cleanup", None).await.expect_err("somebody needs it").to_string();

        assert!(error.contains("kube-relay with pid 4711 (pid "), "{error}");
    }

    #[tokio::test]
    async fn given_all_seats_taken_when_one_more_wants_one_then_it_has_none_until_another_ends() {
        let name = name("full");
        let take = || Seat::take(&name, 252, "a relay");
        let mut holders = Vec::new();
        for _ in 0..SEATS {
            let seat = take().await.expect("a seat");
            holders.push(tokio::spawn(async move { seat.answer().await }));
        }

        take().await.expect_err("there are no more");
        holders[3].abort();
        (&mut holders[3]).await.expect_err("it gave its seat back");

        assert_eq!(take().await.expect("one is free").number, 3);
    }
}
