//! What the help texts and the man pages say beside the flags: written once, shown by both
//! (`tests/man.rs` makes the pages).

use super::exit::Exit;

/// The part of a program's manual that is not made of its flags.
#[derive(Clone, Copy, Debug)]
pub struct Manual {
    /// What the values of the flags look like: a sentence each.
    pub values: &'static [&'static str],
    /// What a command does, and the command.
    pub examples: &'static [(&'static str, &'static str)],
    /// Exit codes.
    pub exits: &'static [(Exit, &'static str)],
    /// More about how the program ends, if there is more.
    pub signals: &'static str,
    /// Files, and what is in them.
    pub files: &'static [(&'static str, &'static str)],
    /// Environment variables, and what they say.
    pub environment: &'static [(&'static str, &'static str)],
    /// Other programs.
    pub see_also: &'static [&'static str],
}

/// The widest line of a help text, in columns.
const WIDTH: usize = 80;

impl Manual {
    /// The end of `--help`.
    pub fn after_help(&self) -> String {
        let mut text = String::new();
        let head = |text: &mut String, name: &str| {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(name);
            text.push_str(":\n");
        };
        if !self.values.is_empty() {
            head(&mut text, "Values");
            self.values.iter().for_each(|v| text.push_str(&wrap("  ", v, 2)));
        }
        head(&mut text, "Examples");
        for (what, command) in self.examples {
            text.push_str(&format!("  # {what}\n  {command}\n"));
        }
        head(&mut text, "Exit status");
        for (exit, meaning) in self.exits {
            text.push_str(&wrap(&format!("  {:<4} ", exit.code()), meaning, 7));
        }
        if !self.signals.is_empty() {
            head(&mut text, "Signals");
            text.push_str(&wrap("  ", self.signals, 2));
        }
        for (name, entries) in [("Files", self.files), ("Environment", self.environment)] {
            if !entries.is_empty() {
                head(&mut text, name);
            }
            for (what, meaning) in entries {
                text.push_str(&format!("  {what}\n{}", wrap("      ", meaning, 6)));
            }
        }
        text.truncate(text.trim_end().len());
        text
    }
}

/// `text` after `prefix` in lines of at most [`WIDTH`] columns, all but the first indented by `rest`.
fn wrap(prefix: &str, text: &str, rest: usize) -> String {
    let (mut out, mut line) = (String::new(), prefix.to_owned());
    let mut gap = "";
    for word in text.split_whitespace() {
        if !gap.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = " ".repeat(rest);
            gap = "";
        }
        line.push_str(gap);
        line.push_str(word);
        gap = " ";
    }
    out + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_with_a_hanging_indent() {
        let text = wrap("  7    ", &"word ".repeat(30), 7);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("  7    word word") && lines[1].starts_with("       word"), "{text}");
        assert!(lines.iter().all(|l| l.len() <= WIDTH), "{text}");
    }
}
