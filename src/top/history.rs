//! The last rates of one thing, as a small graph in a line of text.

use std::collections::VecDeque;

/// The last rates, oldest first. Takes no memory before the first that is not 0: most of a large cluster is idle on one
/// node.
#[derive(Clone, Debug, Default)]
pub struct History(VecDeque<f32>);

impl History {
    /// How many rates are kept.
    pub const LIMIT: usize = 120;

    /// One more.
    pub fn push(&mut self, rate: f64) {
        if self.0.is_empty() && rate <= 0.0 {
            return;
        }
        if self.0.len() == Self::LIMIT {
            self.0.pop_front();
        }
        self.0.push_back(rate as f32);
    }

    /// The last `width` of them as bars, the newest at the right: the highest of them is full, and 0 is empty.
    pub fn bars(&self, width: usize) -> String {
        const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let points: Vec<f32> = self.0.iter().copied().skip(self.0.len().saturating_sub(width)).collect();
        let highest = points.iter().copied().fold(0.0, f32::max);
        let bar = |point: f32| match point {
            point if point > 0.0 => BARS[((point / highest * BARS.len() as f32) as usize).min(BARS.len() - 1)],
            _ => ' ',
        };
        let bars: String = points.into_iter().map(bar).collect();
        format!("{bars:>width$}")
    }

    /// All of them, as whole numbers for a graph.
    pub fn points(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.0.iter().map(|rate| rate.ceil() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(rates: &[f64]) -> History {
        let mut history = History::default();
        rates.iter().for_each(|rate| history.push(*rate));
        history
    }

    #[test]
    fn given_rates_when_drawn_then_the_highest_is_full_and_zero_is_empty() {
        assert_eq!(history(&[1.0, 4.0, 8.0, 0.0]).bars(6), "  ▂▅█ ");
        assert_eq!(history(&[1.0, 4.0, 8.0, 0.0]).bars(2), "█ ");
        assert_eq!(history(&[3.0]).bars(0), "");
    }

    #[test]
    fn given_nothing_but_zeros_when_pushed_then_no_memory_is_taken() {
        let history = history(&[0.0, 0.0]);

        assert_eq!((history.0.capacity(), history.bars(3).as_str()), (0, "   "));
    }

    #[test]
    fn given_more_rates_than_are_kept_when_pushed_then_the_oldest_goes() {
        let history = history(&(0..=History::LIMIT).map(|rate| rate as f64 + 1.0).collect::<Vec<_>>());

        assert_eq!((history.points().count(), history.points().next()), (History::LIMIT, Some(2)));
    }
}
