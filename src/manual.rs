//! What the program tells of its own command line besides `--help`: manual pages, and completions for shells.
//!
//! Both are made from the commands as `cli` has them, so neither can be behind.

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::Cli;

/// The name that shells know the program by.
const PROGRAM: &str = "kube-relay";

/// A script that lets a shell complete commands and flags.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    script
}

/// The manual page of a command, as `man` reads it (roff); without words that of the program. `None` where there is no
/// such command.
pub fn page(words: &[String]) -> Option<Vec<u8>> {
    let mut program = Cli::command();
    program.build(); // So that commands know the whole line that they are called by.
    let command = words.iter().try_fold(&program, |command, word| command.find_subcommand(word))?;
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page).ok()?; // Into memory: that does not fail.
    Some(page)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    fn page_of(line: &str) -> Option<String> {
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        page(&words).map(|page| String::from_utf8(page).expect("text"))
    }

    #[test]
    fn given_each_shell_when_completions_are_asked_for_then_every_command_is_in_them() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(completions(*shell)).expect("text");

            for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }

    #[test]
    fn given_commands_when_their_pages_are_asked_for_then_each_names_its_flags_and_an_unknown_one_has_none() {
        assert!(page_of("").expect("a page").contains("explain"));
        assert!(page_of("run").expect("a page").contains("drain"));
        assert!(page_of("new service").expect("a page").contains("backend"));
        assert_eq!(page_of("nothing"), None);
        assert_eq!(page_of("run nothing"), None);
    }
}
