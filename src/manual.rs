//! What the program tells of its own command line besides `--help`: manual pages, and completions for shells.
//!
//! Both are made from the commands as `cli` has them, so neither can be behind.

use clap::CommandFactory;
use clap::builder::Resettable;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::Cli;

/// The name that shells know the program by.
const PROGRAM: &str = "kube-relay";

/// A script that lets a shell complete commands and flags.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    if shell == Shell::Bash { as_it_is_looked_up(&script) } else { script }
}

/// clap_complete 4.6 spells the dash of our name in two ways, so that bash found nothing after a command
/// (clap-rs/clap#6421). Changes nothing where it has one.
fn as_it_is_looked_up(script: &[u8]) -> Vec<u8> {
    String::from_utf8_lossy(script).replace("kube__subcmd__relay", "kube__relay").into_bytes()
}

/// The manual page of a command, as `man` reads it (roff); without words that of the program. `None` where there is no
/// such command.
pub fn page(words: &[String]) -> Option<Vec<u8>> {
    let mut program = Cli::command().disable_help_subcommand(true); // `man` is that, and has no page of itself.
    program.build(); // So that commands know the whole line that they are called by.
    let command = words.iter().try_fold(&program, |command, word| command.find_subcommand(word))?;
    let examples = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let page = Man::new(command.clone().after_long_help(Resettable::Reset));
    let mut text = Vec::new();
    page.source(format!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"))).render(&mut text).ok()?; // Into memory: that does not fail.
    text.extend(sections(&examples).into_bytes());
    Some(text)
}

/// What follows the flags in `--help`, line by line as it is there: an example is to be copied. What begins at the margin
/// and has a colon begins a section.
fn sections(text: &str) -> String {
    let line = |line: &str| match line.split_once(':') {
        Some((title, rest)) if !line.starts_with(' ') => {
            let rest = rest.trim_start();
            let rest = if rest.is_empty() { String::new() } else { escaped(rest) };
            format!(".fi\n.SH \"{}\"\n.nf\n{rest}", title.to_ascii_uppercase())
        }
        _ => escaped(line.strip_prefix("  ").unwrap_or(line)),
    };
    text.lines().map(line).collect()
}

/// One line that `man` prints as it is.
fn escaped(line: &str) -> String {
    let text = line.replace('\\', r"\e").replace('-', r"\-").replace('\'', r"\(aq");
    let begins = if text.starts_with('.') { r"\&" } else { "" }; // A dot there would begin a command.
    format!("{begins}{text}\n")
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
        assert_eq!(page_of("help"), None, "it is not a command of its own");
        assert_eq!(page_of("run nothing"), None);
    }

    #[test]
    fn given_examples_when_a_page_has_them_then_each_is_a_line_of_its_own_and_other_titles_are_sections() {
        let page = page_of("run").expect("a page");

        assert!(page.contains(".SH \"EXAMPLES\"\n.nf\nA folder of YAML"), "{page}");
        assert!(page.contains("\n  cat web.yaml dns.yaml | kube\\-relay run \\-f \\- \\-\\-nodeport"), "{page}");
        assert!(page.contains(".SH \"SIGNALS\"\n.nf\nSIGTERM drains"), "{page}");
        assert!(page.starts_with(".ie") && page.contains(&format!("\"kube-relay {}\"", env!("CARGO_PKG_VERSION"))));
        assert_eq!(escaped(".a 'b' \\"), "\\&.a \\(aqb\\(aq \\e\n");
    }

    #[test]
    fn given_the_script_of_bash_when_a_command_is_looked_up_then_it_is_under_the_name_that_is_looked_for() {
        let script = String::from_utf8(completions(Shell::Bash)).expect("text");

        let mut names = script.lines().filter_map(|line| line.trim().strip_prefix("cmd=\""));
        assert!(names.all(|name| name == "\"" || script.contains(&format!(" {})\n", name.trim_end_matches('"')))));
    }
}
