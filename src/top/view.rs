//! Where the reader of `top` stands, and what a key does: pure, whatever the terminal is.

use super::order::Sort;
use super::reading::printable;
use crate::name::ObjectName;

/// What a filter may have at most, in characters.
const FILTER_LIMIT: usize = 64;

/// A key, as far as any means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// One row up.
    Up,
    /// One row down.
    Down,
    /// One page up.
    PageUp,
    /// One page down.
    PageDown,
    /// The first row.
    Home,
    /// The last row.
    End,
    /// Into what is selected.
    Enter,
    /// One step back, or out.
    Escape,
    /// Takes a character away.
    Backspace,
    /// A character.
    Char(char),
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-Z.
    Suspend,
}

/// What follows from a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Stay,
    /// The reader has seen enough.
    Quit,
    /// The reader wants the shell for a while.
    Suspend,
}

/// What a key can move in.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// How many rows there are.
    pub count: usize,
    /// How many of them are in sight.
    pub page: usize,
    /// The Service at the cursor.
    pub selected: Option<String>,
}

/// A cursor in a list that changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Its row.
    pub row: usize,
    /// The first row in sight.
    pub first: usize,
    /// What it stays with, wherever that goes. `None` until it is moved: then it stays at the top.
    pub name: Option<String>,
    moved: bool,
}

impl Cursor {
    /// Goes to the row where what it was at is now; where that is gone, it stays at its row as far as there is one.
    pub fn settle(&mut self, row: Option<usize>, count: usize) {
        let row = if self.moved { row.unwrap_or(self.row) } else { 0 };
        self.row = row.min(count.saturating_sub(1));
    }

    /// Stays with what is at its row from now on, if it was ever moved.
    pub fn keep(&mut self, name: Option<String>) {
        self.name = name.filter(|_| self.moved);
    }

    /// The first row to show, where so many are in sight.
    pub fn scroll(&mut self, page: usize, count: usize) -> usize {
        let last_first = count.saturating_sub(page);
        let lowest = (self.row + 1).saturating_sub(page);
        self.first = self.first.clamp(lowest.min(self.row), self.row).min(last_first.max(lowest));
        self.first
    }

    fn press(&mut self, key: Key, place: &Place) {
        let (last, page) = (place.count.saturating_sub(1), place.page.max(1));
        let row = match key {
            Key::Up | Key::Char('k') => self.row.saturating_sub(1),
            Key::Down | Key::Char('j') => self.row + 1,
            Key::PageUp => self.row.saturating_sub(page),
            Key::PageDown => self.row + page,
            Key::Home | Key::Char('g') => 0,
            Key::End | Key::Char('G') => last,
            _ => return,
        };
        (self.row, self.name) = (row.min(last), None);
        self.moved = self.row > 0;
    }
}

/// What is looked at.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// What Services are sorted by.
    pub sort: Sort,
    /// The other way around.
    pub reversed: bool,
    /// Words that a Service has to have.
    pub filter: String,
    /// The filter is being typed.
    pub typing: bool,
    /// The keys are shown.
    pub help: bool,
    /// What is shown stays as it is.
    pub paused: bool,
    /// One Service is looked at: its name.
    pub service: Option<String>,
    /// In the list of Services.
    pub services: Cursor,
    /// In the list of its backends.
    pub backends: Cursor,
}

impl View {
    /// At the top of the Services, or in one of them.
    pub fn new(sort: Sort, filter: &str, service: Option<&ObjectName>) -> Self {
        let service = service.map(|name| printable(&name.to_string()));
        Self { sort, filter: filter.to_owned(), service, ..Self::default() }
    }

    /// What a key does.
    pub fn press(&mut self, key: Key, place: &Place) -> Outcome {
        match key {
            Key::Interrupt => return Outcome::Quit,
            Key::Suspend => return Outcome::Suspend,
            _ => {}
        }
        if self.help {
            self.help = false;
            return Outcome::Stay;
        }
        if self.typing {
            self.type_filter(key);
            return Outcome::Stay;
        }
        match key {
            Key::Char('q') => return Outcome::Quit,
            Key::Escape => return self.step_back(),
            Key::Char('?') => self.help = true,
            Key::Char('p' | ' ') => self.paused = !self.paused,
            _ if self.service.is_some() => match key {
                Key::Backspace => self.service = None,
                key => self.backends.press(key, place),
            },
            Key::Char('/') => self.typing = true,
            Key::Char('s') => self.sort = self.sort.next(),
            Key::Char('S') => self.sort = self.sort.previous(),
            Key::Char('r') => self.reversed = !self.reversed,
            Key::Enter => {
                self.service.clone_from(&place.selected);
                self.backends = Cursor::default();
            }
            key => self.services.press(key, place),
        }
        Outcome::Stay
    }

    fn type_filter(&mut self, key: Key) {
        match key {
            Key::Enter => self.typing = false,
            Key::Escape => {
                self.typing = false;
                self.filter.clear();
            }
            Key::Backspace => drop(self.filter.pop()),
            Key::Char(c) if !c.is_control() && self.filter.chars().count() < FILTER_LIMIT => self.filter.push(c),
            _ => {}
        }
    }

    /// Out of one Service, then without a filter, then out.
    fn step_back(&mut self) -> Outcome {
        if self.service.take().is_some() {
            return Outcome::Stay;
        }
        if self.filter.is_empty() {
            return Outcome::Quit;
        }
        self.filter.clear();
        Outcome::Stay
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(count: usize) -> Place {
        Place { count, page: 10, selected: Some("default/web".into()) }
    }

    fn press(view: &mut View, keys: &[Key]) -> Outcome {
        keys.iter().map(|key| view.press(*key, &place(100))).last().unwrap_or(Outcome::Stay)
    }

    #[test]
    fn given_keys_that_move_when_pressed_then_the_cursor_stays_between_the_ends() {
        let mut view = View::default();
        let mut row_after = |key| {
            press(&mut view, &[key]);
            view.services.row
        };

        let rows = [Key::Up, Key::Down, Key::PageDown, Key::End, Key::Down, Key::PageUp, Key::Char('k'), Key::Home];
        assert_eq!(rows.map(&mut row_after), [0, 1, 11, 99, 99, 89, 88, 0]);
    }

    #[test]
    fn given_a_filter_when_typed_then_keys_are_letters_until_it_is_done() {
        let mut view = View::default();

        let typed = [Key::Char('/'), Key::Char('q'), Key::Char('x'), Key::Backspace, Key::Char('?'), Key::Enter];
        assert_eq!(press(&mut view, &typed), Outcome::Stay);
        assert_eq!((view.filter.as_str(), view.typing, view.help), ("q?", false, false));

        assert_eq!(press(&mut view, &[Key::Escape]), Outcome::Stay, "the filter goes first");
        assert_eq!(view.filter, "");
        assert_eq!(press(&mut view, &[Key::Escape]), Outcome::Quit);
    }

    #[test]
    fn given_help_when_any_key_is_pressed_then_it_goes_and_nothing_else_happens() {
        let mut view = View::default();

        press(&mut view, &[Key::Char('?')]);
        assert_eq!(press(&mut view, &[Key::Suspend]), Outcome::Suspend);
        assert!(view.help, "it is there when the reader comes back");
        assert_eq!(press(&mut view, &[Key::Char('q')]), Outcome::Stay);

        assert!(!view.help);
        assert_eq!(press(&mut view, &[Key::Interrupt]), Outcome::Quit);
    }

    #[test]
    fn given_one_service_when_looked_at_then_keys_of_the_list_do_nothing() {
        let mut view = View::default();

        press(&mut view, &[Key::Enter, Key::Char('s'), Key::Char('/'), Key::Char('r')]);

        assert_eq!(view.service.as_deref(), Some("default/web"));
        assert_eq!((view.sort, view.typing, view.reversed), (Sort::default(), false, false));
        press(&mut view, &[Key::Backspace]);
        assert_eq!(view.service, None);
    }

    #[test]
    fn given_a_long_list_when_scrolled_then_the_cursor_is_in_sight_and_no_page_is_half_empty() {
        let mut cursor = Cursor { row: 50, moved: true, ..Cursor::default() };

        assert_eq!(cursor.scroll(10, 100), 41);
        cursor.row = 45;
        assert_eq!(cursor.scroll(10, 100), 41, "still in sight");
        assert_eq!(cursor.scroll(80, 100), 20, "a larger terminal");
        cursor.row = 3;
        assert_eq!(cursor.scroll(10, 4), 0);
        assert_eq!(cursor.scroll(0, 4), 3, "no room at all");
    }

    fn key() -> impl Strategy<Value = Key> {
        use Key::*;
        let named = vec![Up, Down, PageUp, PageDown, Home, End, Enter, Escape, Backspace];
        prop_oneof![
            prop::sample::select(named),
            any::<char>().prop_map(Char),
            "[/?srpgjk ]".prop_map(|c| { Char(c.chars().next().unwrap_or(' ')) })
        ]
    }

    proptest! {
        #[test]
        fn given_any_keys_when_pressed_then_the_cursor_is_in_the_list_and_in_sight(
            keys in prop::collection::vec((key(), 0_usize..30, 0_usize..12), 0..60),
        ) {
            let mut view = View::default();
            for (key, count, page) in keys {
                view.press(key, &Place { count, page, selected: Some("default/web".into()) });
                view.services.settle(None, count);
                view.backends.settle(None, count);
                for cursor in [&mut view.services, &mut view.backends] {
                    let first = cursor.scroll(page, count);
                    prop_assert!(cursor.row < count.max(1));
                    prop_assert!(first <= cursor.row && cursor.row < first + page.max(1), "{:?} of {}", cursor, page);
                }
                prop_assert!(view.filter.chars().count() <= FILTER_LIMIT);
            }
        }
    }
}
