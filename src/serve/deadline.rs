//! Waits that end: at an instant, or after a turn of the event loop.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

use crate::serve::worker::sleep_until;

/// The outcome of a future, unless an instant comes first.
pub(crate) async fn before<T>(deadline: Instant, mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut sleep = sleep_until(deadline);
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending => Pin::new(&mut sleep).poll(cx).map(|()| None),
    })
    .await
}

/// The outcome of a future, unless a turn of the event loop has brought none.
pub(crate) async fn within_a_turn<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut turned = false;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending if turned => Poll::Ready(None),
        Poll::Pending => {
            turned = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}
