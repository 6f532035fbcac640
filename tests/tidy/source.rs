//! Rust as text, for the rules in `tidy.rs`: what is code, what is a comment, a literal or a test module.
//!
//! A scan by characters, not a parser: it knows just enough to find words, braces and functions in this tree.

use std::collections::BTreeSet;
use std::ops::Range;

/// A Rust file: as it stands, and as code alone (same length; comments, literals and test modules are spaces).
pub struct Source {
    /// Its path from the root.
    pub path: String,
    /// As it stands.
    pub text: String,
    /// Its code alone.
    pub code: String,
    /// String literals outside test modules, without their quotes.
    pub literals: Vec<String>,
}

impl Source {
    /// The file of that path and text.
    pub fn of(path: &str, text: &str) -> Self {
        let mut code = text.to_owned();
        let mut literals = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let length = quiet(text, at);
            if length > 0 {
                blank(&mut code, at..at + length);
                let inner = text[at..at + length].split_once('"').and_then(|(_, inner)| inner.rsplit_once('"'));
                literals.push((at, inner.map_or_else(String::new, |(inner, _)| inner.to_owned())));
            }
            at += length.max(text[at..].chars().next().map_or(1, char::len_utf8));
        }
        literals.retain(|(at, _)| text[*at..].starts_with(['"', 'b', 'r']));
        while let Some(start) = code.find("#[cfg(test)]") {
            let item = start + code[start..].find(['{', ';']).expect("an item");
            let end = if code[item..].starts_with('{') { closing(&code, item) } else { item };
            blank(&mut code, start..end + 1);
            literals.retain(|(at, _)| !(start..end).contains(at));
        }
        let literals = literals.into_iter().map(|(_, literal)| literal).collect();
        Self { path: path.to_owned(), text: text.to_owned(), code, literals }
    }

    /// Its name without folders.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap()
    }

    /// The module of the crate it belongs to: `chat` of `src/chat/turn.rs`, `config` of `src/config.rs`.
    pub fn module(&self) -> &str {
        let rest = self.path.strip_prefix("src/").unwrap();
        rest.split(['/', '.']).next().unwrap()
    }

    /// Where `word` stands in the code as a whole word.
    pub fn words<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        self.code.match_indices(word).map(|(at, _)| at).filter(move |at| {
            let before = self.code[..*at].chars().next_back();
            let after = self.code[at + word.len()..].chars().next();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
    }

    /// The line of a place in the code.
    pub fn line(&self, at: usize) -> usize {
        self.code[..at].matches('\n').count() + 1
    }

    /// The code after each whole word, with the place: `path:line`.
    pub fn after<'a>(&'a self, word: &'a str) -> impl Iterator<Item = (String, &'a str)> + 'a {
        self.words(word).map(move |at| (format!("{}:{}", self.path, self.line(at)), &self.code[at + word.len()..]))
    }
}

/// Whether an identifier may have this character.
pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The identifier that begins a text.
pub fn head(text: &str) -> &str {
    &text[..text.find(|c| !is_word(c)).unwrap_or(text.len())]
}

/// How many bytes of comment or literal begin at `at`.
fn quiet(text: &str, at: usize) -> usize {
    let rest = &text[at..];
    let to = |end: &str, from: usize| rest[from..].find(end).map_or(rest.len(), |found| from + found + end.len());
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return to("*/", 2);
    }
    if rest.starts_with('"') || rest.starts_with("b\"") {
        let open = rest.find('"').unwrap_or(0) + 1;
        let mut escaped = false;
        let end = rest[open..].find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        return end.map_or(rest.len(), |end| open + end + 1);
    }
    if !text[..at].chars().next_back().is_some_and(is_word) {
        let raw = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r')).unwrap_or_default();
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            return to(&format!("\"{}", "#".repeat(hashes)), rest.len() - raw.len() + hashes + 1);
        }
    }
    if let Some(inner) = rest.strip_prefix('\'') {
        // A character, or else a lifetime.
        let mut chars = inner.char_indices();
        return match (chars.next(), chars.next()) {
            (Some((_, '\\')), Some((second, escaped))) => to("'", 1 + second + escaped.len_utf8()),
            (Some(_), Some((second, '\''))) => 1 + second + 1,
            _ => 0,
        };
    }
    0
}

/// Blanks a range but for its line ends.
fn blank(code: &mut String, range: Range<usize>) {
    let blanked: String = code[range.clone()].bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect();
    code.replace_range(range, &blanked);
}

/// Where the brace that opens at `open` is closed.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0_usize;
    let end = code[open..].find(|c| {
        depth += usize::from(c == '{');
        depth -= usize::from(c == '}');
        depth == 0
    });
    open + end.expect("a closing brace")
}

/// Every function with a body: its name and how many lines it has.
pub fn functions(source: &Source) -> Vec<(&str, usize)> {
    let mut found = Vec::new();
    for at in source.words("fn") {
        let name = head(source.code[at + 2..].trim_start());
        let mut depth = 0_i32;
        let body = source.code[at..].find(|c| {
            depth += i32::from(matches!(c, '(' | '[')) - i32::from(matches!(c, ')' | ']'));
            depth == 0 && matches!(c, '{' | ';')
        });
        if let Some(open) = body.map(|body| at + body).filter(|open| !name.is_empty() && source.code[*open..].starts_with('{')) {
            found.push((name, source.line(closing(&source.code, open)) - source.line(at) + 1));
        }
    }
    found
}

/// The modules of the crate that a file names, with the place.
pub fn uses(source: &Source, modules: &BTreeSet<String>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for path in ["crate::", "super::super::"] {
        for (at, _) in source.code.match_indices(path) {
            let rest = &source.code[at + path.len()..];
            // The first segment of one path, or of each path of a group; deeper ones only look like some of a group.
            let firsts: Vec<&str> = match rest.strip_prefix('{') {
                Some(group) => group[..closing(rest, 0) - 1].split(',').map(|path| head(path.trim_start())).collect(),
                None => vec![head(rest)],
            };
            let place = format!("{}:{}", source.path, source.line(at));
            found.extend(
                firsts.into_iter().filter(|first| modules.contains(*first)).map(|first| (place.clone(), first.to_owned())),
            );
        }
    }
    found
}

mod tests {
    use super::*;

    #[test]
    fn rust_is_read_as_it_is_written() {
        let text = concat!(
            "//! panic!\nfn a<'a>(x: &'a str) -> char {\n    let _ = (\"} worker:: \\\" //\", r#\"{ \"panic!\" r\"#, '{', '\\'');\n    /* { */ 'x'\n}\n",
            "#[cfg(test)]\nmod tests {\n    fn b() { panic!(\"no\") }\n}\nfn c(_: [u8; 2]) {}\n",
        );
        let source = Source::of("src/chat/x.rs", text);
        assert_eq!(source.code.len(), text.len());
        assert_eq!(functions(&source), [("a", 4), ("c", 1)]);
        assert_eq!(source.literals, ["} worker:: \\\" //", "{ \"panic!\" r"]);
        assert!(source.words("panic").next().is_none() && source.words("worker").next().is_none());
        let source = Source::of(
            "src/llm/x.rs",
            "use crate::{chat::turn, error};\nuse crate::generation::Job;\nuse super::super::quota;\n",
        );
        let modules = ["chat", "error", "generation", "quota", "turn"].map(str::to_owned).into();
        let used: Vec<String> = uses(&source, &modules).into_iter().map(|(_, used)| used).collect();
        assert_eq!(used, ["chat", "error", "generation", "quota"]);
    }
}
