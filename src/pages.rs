//! Pages that are dear, made one at a time: those who ask while one is made share the next one, however many they are.

use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio_util::task::AbortOnDropHandle;

/// Those who ask and have to wait to be heard at all.
const QUEUE: usize = 64;

/// Whom to ask. A task of its own has pages made, on a thread for what takes its time; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Pages<T> {
    asks: mpsc::Sender<oneshot::Sender<T>>,
    _maker: AbortOnDropHandle<()>,
}

impl<T: Clone + Send + 'static> Pages<T> {
    /// Pages of one kind. Each is as things are when it is made, and nobody gets one that was begun before he asked.
    pub(crate) fn made_by(make: impl Fn() -> T + Clone + Send + 'static) -> Self {
        let (asks, mut asked) = mpsc::channel::<oneshot::Sender<T>>(QUEUE);
        let maker = async move {
            while let Some(first) = asked.recv().await {
                let mut readers = vec![first];
                while let Ok(reader) = asked.try_recv() {
                    readers.push(reader);
                }
                // Where it panics they are told that there is none, as what they wait on is dropped.
                if let Ok(page) = spawn_blocking(make.clone()).await {
                    readers.into_iter().for_each(|reader| drop(reader.send(page.clone())));
                }
            }
        };
        Self { asks, _maker: AbortOnDropHandle::new(tokio::spawn(maker)) }
    }

    /// A page as things are from now on; `None` where it could not be made.
    pub(crate) async fn get(&self) -> Option<T> {
        let (page, made) = oneshot::channel();
        self.asks.send(page).await.ok()?;
        made.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, mpsc};

    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    #[tokio::test]
    async fn given_many_who_ask_while_a_page_is_made_when_it_is_done_then_they_share_the_next_one() {
        let (go, may) = mpsc::channel();
        let (begun, mut begins) = unbounded_channel();
        let (made, may) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(may)));
        let pages = Pages::made_by(move || {
            begun.send(()).expect("the test");
            may.lock().expect("one maker").recv().expect("the test");
            made.fetch_add(1, Ordering::Relaxed)
        });

        let (first, others) = tokio::join!(pages.get(), async {
            begins.recv().await;
            // Both ask before the third lets the first page be done.
            tokio::join!(pages.get(), pages.get(), async { (0..2).for_each(|_| go.send(()).expect("it is made")) })
        });

        assert_eq!((first, others), (Some(0), (Some(1), Some(1), ())));
    }

    #[tokio::test]
    async fn given_a_page_that_panics_when_asked_for_then_there_is_none_and_the_next_is_made() {
        let tries = Arc::new(AtomicUsize::new(0));
        let pages = Pages::made_by(move || match tries.fetch_add(1, Ordering::Relaxed) {
            0 => panic!("on purpose"),
            number => number,
        });

        assert_eq!(pages.get().await, None);
        assert_eq!(pages.get().await, Some(1));
    }
}
