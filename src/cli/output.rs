//! Lines on standard output and standard error that outlive a closed pipe.

use std::fmt;
use std::io::{self, Write};

use serde::Serialize;

/// Prints a line on standard output. False when nobody reads it any more.
pub fn line(text: impl fmt::Display) -> bool {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// Prints one JSON object as a line. False when nobody reads it any more.
pub fn json(value: &impl Serialize) -> bool {
    match serde_json::to_string(value) {
        Ok(text) => line(text),
        Err(e) => {
            complain("json", format_args!("cannot write a result: {e}"));
            true
        }
    }
}

/// Prints `PROGRAM: TEXT` on standard error.
pub fn complain(program: &str, text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{program}: {text}");
}

/// `error` with its causes, as one line; a cause that the text before it has is not said again.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}
