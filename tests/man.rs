//! The man pages (`man/`) and shell completions (`completions/`), made from the definitions that the
//! programs parse with. Without `UPDATE=1` this fails when a file is not what they say; with it, it
//! writes the files:
//!
//! ```sh
//! UPDATE=1 cargo test --test man
//! ```

use std::fs;
use std::path::Path;
use std::process::Command as Process;

use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use vmferry::cli::manual::Manual;
use vmferry::cli::{vmctl, vmrecv, vmrun, vmsend};

/// Columns of a terminal that examples must fit in, less the indentation of a man page.
const EXAMPLE_COLUMNS: usize = 69;

fn programs() -> Vec<(Command, Manual)> {
    vec![
        (vmctl::Args::command(), vmctl::MANUAL),
        (vmrecv::Args::command(), vmrecv::MANUAL),
        (vmrun::Args::command(), vmrun::MANUAL),
        (vmsend::Args::command(), vmsend::MANUAL),
    ]
}

/// Every generated file: its path in the repository and what is to be in it.
fn files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for (mut command, manual) in programs() {
        let name = command.get_name().to_owned();
        command.build();
        files.push((format!("man/{name}.1"), page(&command, &manual)));
        for (shell, file) in [
            (Shell::Bash, format!("{name}.bash")),
            (Shell::Zsh, format!("_{name}")),
            (Shell::Fish, format!("{name}.fish")),
        ] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, &name, &mut text);
            files.push((format!("completions/{file}"), String::from_utf8(text).unwrap()));
        }
    }
    files
}

/// A man page, in the order of man-pages(7).
fn page(command: &Command, manual: &Manual) -> String {
    let name = command.get_name();
    let release = format!("vmferry {}", command.get_version().unwrap());
    let man = Man::new(command.clone()).title(name.to_uppercase()).source(release).manual("vmferry");
    let mut head = Vec::new();
    man.render_title(&mut head).unwrap();

    let mut r = Roff::new();
    r.control("SH", ["NAME"]);
    let about = command.get_about().unwrap().to_string();
    r.text([roman(format!("{name} - {}{}", about[..1].to_lowercase(), &about[1..]))]);
    r.control("SH", ["SYNOPSIS"]);
    for (n, form) in command.get_overridden_usage().unwrap().to_string().lines().enumerate() {
        if n > 0 {
            r.control("br", []);
        }
        r.text(synopsis(form.trim()));
    }
    r.control("SH", ["DESCRIPTION"]);
    paragraphs(&mut r, &command.get_long_about().unwrap().to_string(), "PP");
    options(&mut r, command, manual);
    if command.has_subcommands() {
        r.control("SH", ["COMMANDS"]);
        command.get_subcommands().for_each(|sub| subcommand(&mut r, sub));
    }
    r.control("SH", ["EXAMPLES"]);
    for (what, example) in manual.examples {
        r.control("PP", []);
        r.text([roman(format!("{}{}:", what[..1].to_uppercase(), what[1..].trim_end_matches('?')))]);
        r.control("PP", []);
        r.control("RS", ["4"]);
        r.control("nf", []);
        r.text([bold(*example)]);
        r.control("fi", []);
        r.control("RE", []);
    }
    let entry = |r: &mut Roff, what: String, meaning: &str| {
        r.control("TP", []);
        r.text([bold(what)]);
        r.text(words(&sentence(meaning)));
    };
    r.control("SH", ["EXIT STATUS"]);
    manual.exits.iter().for_each(|(exit, text)| entry(&mut r, exit.code().to_string(), text));
    if !manual.signals.is_empty() {
        r.control("SH", ["SIGNALS"]);
        r.text(words(manual.signals));
    }
    for (heading, entries) in [("FILES", manual.files), ("ENVIRONMENT", manual.environment)] {
        if !entries.is_empty() {
            r.control("SH", [heading]);
        }
        entries.iter().for_each(|(what, text)| entry(&mut r, (*what).to_owned(), text));
    }
    r.control("SH", ["SEE ALSO"]);
    let mut others = Vec::new();
    for (n, other) in manual.see_also.iter().enumerate() {
        others.extend([bold(*other), roman(if n + 1 < manual.see_also.len() { "(1), " } else { "(1)" })]);
    }
    r.text(others);
    let generated = ".\\\" Made by `UPDATE=1 cargo test --test man` from the definitions in src/cli.\n";
    // Flags are to be found and copied whole: no hyphenation, no stretched lines.
    let layout = ".nh\n.ad l\n";
    format!("{generated}{}{layout}{}", String::from_utf8(head).unwrap(), without_preamble(&r.render()))
}

/// The title comes first and brings the macros that text needs; they are wanted once.
fn without_preamble(text: &str) -> &str {
    &text[text.find(".SH").unwrap()..]
}

/// Flags without a heading, then heading by heading.
fn options(r: &mut Roff, command: &Command, manual: &Manual) {
    r.control("SH", ["OPTIONS"]);
    let shown: Vec<&Arg> = command.get_arguments().filter(|a| !a.is_hide_set()).collect();
    let plain = |a: &&&Arg| a.get_help_heading().is_none();
    shown.iter().filter(plain).filter(|a| a.is_positional()).for_each(|a| option(r, a));
    shown.iter().filter(plain).filter(|a| !a.is_positional()).for_each(|a| option(r, a));
    let mut headings: Vec<&str> = Vec::new();
    for heading in shown.iter().filter_map(|a| a.get_help_heading()) {
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    for heading in headings {
        r.control("SS", [heading]);
        shown.iter().filter(|a| a.get_help_heading() == Some(heading)).for_each(|a| option(r, a));
    }
    if !manual.values.is_empty() {
        r.control("SS", ["Values"]);
        for value in manual.values {
            r.control("PP", []);
            r.text(words(value));
        }
    }
}

fn option(r: &mut Roff, arg: &Arg) {
    r.control("TP", []);
    r.text(flag(arg));
    let help = arg.get_long_help().or_else(|| arg.get_help()).map(ToString::to_string).unwrap_or_default();
    // What points from one form of the help to the other means nothing on paper.
    let help = help.split(" (see ").next().unwrap();
    paragraphs(r, help, "IP");
    let values: Vec<_> = arg
        .get_possible_values()
        .into_iter()
        .filter(|v| v.get_help().is_some() && !v.is_hide_set())
        .collect();
    if !values.is_empty() && arg.get_action().takes_values() {
        r.control("RS", []);
        for value in values {
            r.control("TP", ["8"]);
            r.text([bold(value.get_name())]);
            r.text(words(&sentence(&value.get_help().unwrap().to_string())));
        }
        r.control("RE", []);
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if !defaults.is_empty() && !arg.is_hide_default_value_set() && arg.get_action().takes_values() {
        r.control("IP", []);
        r.text([roman(format!("The default is {}.", defaults.join(", ")))]);
    }
}

/// `-m, --memory SIZE`
fn flag(arg: &Arg) -> Vec<Inline> {
    let mut line = Vec::new();
    if let Some(short) = arg.get_short() {
        line.extend([bold(format!("-{short}")), roman(", ")]);
    }
    if let Some(long) = arg.get_long() {
        line.push(bold(format!("--{long}")));
    }
    if arg.get_action().takes_values() {
        if !line.is_empty() {
            line.push(roman(" "));
        }
        line.push(italic(arg.get_value_names().unwrap()[0].as_str()));
    }
    line
}

fn subcommand(r: &mut Roff, sub: &Command) {
    let own: Vec<&Arg> = sub.get_arguments().filter(|a| !a.is_global_set() && a.get_id() != "help").collect();
    let mut line = vec![bold(sub.get_name())];
    for arg in &own {
        line.push(roman(" ["));
        line.extend(flag(arg));
        line.push(roman("]"));
    }
    r.control("TP", []);
    r.text(line);
    let about = sub.get_long_about().or_else(|| sub.get_about()).unwrap().to_string();
    paragraphs(r, &about, "IP");
    if !own.is_empty() {
        r.control("RS", []);
        own.into_iter().for_each(|arg| option(r, arg));
        r.control("RE", []);
    }
}

/// Text as paragraphs, each but the first begun by `macro_name`.
fn paragraphs(r: &mut Roff, text: &str, macro_name: &str) {
    for (n, paragraph) in text.split("\n\n").enumerate() {
        if n > 0 {
            r.control(macro_name, []);
        }
        r.text(words(&sentence(paragraph)));
    }
}

/// Ends with a full stop.
fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.ends_with(['.', '?', ':']) { text.to_owned() } else { format!("{text}.") }
}

/// `code` becomes bold.
fn words(text: &str) -> Vec<Inline> {
    let parts = text.split('`').enumerate();
    parts.map(|(n, part)| if n % 2 == 1 { bold(part) } else { roman(part) }).collect()
}

/// A usage line: flags and the program bold, values italic.
fn synopsis(form: &str) -> Vec<Inline> {
    let mut line = Vec::new();
    for (n, word) in form.split(' ').enumerate() {
        if n > 0 {
            line.push(roman(" "));
        }
        if let Some(value) = word.strip_prefix('<').and_then(|w| w.strip_suffix('>')) {
            line.push(italic(value));
        } else if let Some(optional) = word.strip_prefix("[-") {
            line.extend([roman("["), bold(format!("-{}", optional.trim_end_matches(']'))), roman("]")]);
        } else if n == 0 || word.starts_with('-') {
            line.push(bold(word));
        } else {
            line.push(roman(word));
        }
    }
    line
}

#[test]
fn man_pages_and_completions_are_what_the_programs_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let update = std::env::var_os("UPDATE").is_some_and(|v| v == "1");
    let mut stale = Vec::new();
    for (path, text) in files() {
        let file = root.join(&path);
        if update {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
        } else if fs::read_to_string(&file).ok().as_ref() != Some(&text) {
            stale.push(path);
        }
    }
    assert!(
        stale.is_empty(),
        "stale: {}; write them anew with: UPDATE=1 cargo test --test man",
        stale.join(", ")
    );
}

#[test]
fn every_page_has_its_sections_in_order() {
    let wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS", "SEE ALSO"];
    for (path, text) in files().into_iter().filter(|(path, _)| path.starts_with("man/")) {
        let sections: Vec<&str> =
            text.lines().filter_map(|l| l.strip_prefix(".SH ")).map(|s| s.trim_matches('"')).collect();
        let found: Vec<&str> = sections.iter().copied().filter(|s| wanted.contains(s)).collect();
        assert_eq!(found, wanted, "{path}: {sections:?}");
    }
}

/// man(1) is asked where it is there; it prints what it does not understand.
#[test]
fn man_renders_every_page_without_a_warning() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let version = Process::new("man").arg("--version").output();
    if !version.is_ok_and(|v| String::from_utf8_lossy(&v.stdout).starts_with("man ")) {
        println!("man is not here, so it is not asked");
        return;
    }
    for (path, _) in files().into_iter().filter(|(path, _)| path.starts_with("man/")) {
        let shown = Process::new("man")
            .args(["--warnings", "-l"])
            .arg(root.join(&path))
            .env("MANWIDTH", "80")
            .env("LC_ALL", "C.UTF-8")
            .output()
            .unwrap();
        let complaints = String::from_utf8_lossy(&shown.stderr);
        assert!(shown.status.success() && complaints.is_empty(), "{path}: {complaints}");
        let text = String::from_utf8_lossy(&shown.stdout);
        assert!(
            text.contains("EXIT STATUS") && text.lines().all(|l| l.chars().count() <= 80),
            "{path}:\n{text}"
        );
    }
}

#[test]
fn help_texts_fit_a_terminal_and_every_flag_has_one() {
    for (mut command, manual) in programs() {
        command.build();
        for (_, example) in manual.examples {
            assert!(example.chars().count() <= EXAMPLE_COLUMNS, "too long for a line: {example}");
        }
        let mut commands = vec![&command];
        commands.extend(command.get_subcommands());
        for arg in commands.iter().flat_map(|c| c.get_arguments()) {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let said = format!("{} {}: {help:?}", command.get_name(), arg.get_id());
            assert!(!help.is_empty() && help.chars().count() <= 90 && !help.ends_with('.'), "{said}");
            // A value that has no default says what happens without it, or is required.
            let optional = arg.get_action().takes_values()
                && !arg.is_required_set()
                && arg.get_default_values().is_empty()
                && arg.get_long().is_some_and(|l| l.contains("timeout") || l.contains("passes"));
            assert!(!optional || help.contains("by default"), "{said}");
        }
    }
}

/// Flags of the same name mean the same, and say it in the same words.
#[test]
fn flags_of_several_programs_read_the_same() {
    let programs = programs();
    let mut different = Vec::new();
    for same in ["json", "quiet", "log", "insecure", "peer-timeout"] {
        let mut said: Vec<String> = programs
            .iter()
            .flat_map(|(c, _)| c.get_arguments())
            .filter(|a| a.get_long() == Some(same))
            .map(|a| format!("{:?} {}", a.get_value_names(), a.get_help().unwrap()))
            .map(|s| s.trim_end_matches(", the result last").to_owned())
            .collect();
        assert!(said.len() > 1, "{same}");
        said.dedup();
        if said.len() > 1 {
            different.push(said);
        }
    }
    assert!(different.is_empty(), "{different:#?}");
}
