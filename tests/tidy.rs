//! The rules of the house: what ARCHITECTURE.md promises about this tree, and what the READMEs tell of it, is read off the
//! files here.
//!
//! Everything works on text, once comments, literals and test modules are blanked ([`Source`]). A rule that fails says
//! which file and what to do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "tidy/source.rs"]
mod source;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::path::Path;

use inkstone::generation::Ids;
use inkstone::generation::event::{Event, Mode, Renderer};
use inkstone::quota::{Crossing, Level, QuotaType, Usage};
use inkstone::router::ROUTES;
use source::{Source, functions, head, is_word, uses};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
/// Functions that may be longer: (file, function, why). None so far.
const LONG_FUNCTIONS: [(&str, &str, &str); 0] = [];

/// The crates that are the runtime.
const RUNTIME: [&str; 4] = ["worker", "wasm_bindgen", "js_sys", "web_sys"];
/// Names of files that may know the runtime, wherever they stand; so may all of `src/platform` and the root files below.
const EDGE_NAMES: [&str; 15] = [
    "routes.rs",
    "object.rs",
    "store.rs",
    "client.rs",
    "engine.rs",
    "pump.rs",
    "index.rs",
    "projection.rs",
    "turns.rs",
    "admin_routes.rs",
    "codes.rs",
    "outbox.rs",
    "periods.rs",
    "reports.rs",
    "webhook.rs",
];
const EDGE_ROOTS: [&str; 3] = ["src/lib.rs", "src/router.rs", "src/config.rs"];

/// What each module may use: the table of ARCHITECTURE.md.
const MAY_USE: [(&str, &[&str]); 9] = [
    ("error", &[]),
    ("identity", &["error"]),
    ("config", &["error", "identity", "platform", "quota"]),
    ("platform", &["config", "error", "identity", "quota"]),
    ("quota", &["config", "error", "identity", "platform"]),
    ("llm", &["config", "error", "platform", "quota"]),
    ("generation", &["config", "error", "identity", "llm", "platform", "quota"]),
    ("chat", &["config", "error", "generation", "identity", "llm", "platform", "quota"]),
    ("system", &["config", "error", "platform"]),
];
/// Modules that may use all.
const TOP: [&str; 2] = ["lib", "router"];
/// Directions that no edit of the table above may turn: (module, what it must never use).
const NEVER: [(&str, &str); 8] = [
    ("quota", "chat"),
    ("quota", "system"),
    ("quota", "generation"),
    ("llm", "chat"),
    ("generation", "chat"),
    ("identity", "chat"),
    ("llm", "generation"),
    ("identity", "generation"),
];

const READMES: [&str; 2] = ["README.md", "README.zh-CN.md"];

// ---------------------------------------------------------------- files

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn source(path: &str) -> Source {
    Source::of(path, &read(path))
}

fn exists(path: &str) -> bool {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists()
}

/// The names in a folder, sorted; folders end in `/`.
fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
    let name = |entry: fs::DirEntry| {
        let slash = if entry.path().is_dir() { "/" } else { "" };
        format!("{}{slash}", entry.file_name().into_string().unwrap())
    };
    let mut names: Vec<String> = entries.map(|entry| name(entry.unwrap())).collect();
    names.sort();
    names
}

/// Every Rust file under a folder.
fn sources(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    for name in names(folder) {
        if let Some(inner) = name.strip_suffix('/') {
            found.extend(sources(&format!("{folder}/{inner}")));
        } else if name.ends_with(".rs") {
            found.push(source(&format!("{folder}/{name}")));
        }
    }
    found
}

/// Fails with every breach of a rule at once.
#[track_caller]
fn hold(rule: &str, breaches: impl IntoIterator<Item = impl Display>) {
    let list: Vec<String> = breaches.into_iter().map(|breach| format!("  {breach}")).collect();
    assert!(list.is_empty(), "{rule}\n{}\n", list.join("\n"));
}

// ---------------------------------------------------------------- Markdown as text

/// The rows of every table, as trimmed cells.
fn rows(markdown: &str) -> Vec<Vec<String>> {
    let row = |line: &str| {
        let inner = line.strip_prefix("| ")?.strip_suffix(" |")?;
        Some(inner.replace("\\|", "\u{0}").split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect())
    };
    markdown.lines().filter_map(row).collect()
}

/// What stands between single backticks, fences left out.
fn quoted(markdown: &str) -> Vec<&str> {
    let prose = markdown.split("```").step_by(2);
    prose.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

fn unquoted(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}

fn is_setting(word: &str) -> bool {
    word.len() > 2
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

// ---------------------------------------------------------------- the rules

#[test]
fn every_file_says_what_it_is_and_is_short_enough_to_read() {
    let files: Vec<Source> = ["src", "tests"].into_iter().flat_map(sources).collect();
    hold(
        "begin with `//!`: what, invariant, why",
        files.iter().filter(|file| !file.text.starts_with("//!")).map(|file| &file.path),
    );
    let lines = files.iter().map(|file| (&file.path, file.text.lines().count()));
    let long = lines.filter(|(_, count)| *count > FILE_LINES_MAX).map(|(path, count)| format!("{path}: {count} lines"));
    hold(&format!("files have at most {FILE_LINES_MAX} lines; take a part out"), long);
}

#[test]
fn functions_fit_on_a_page() {
    let mut long = BTreeSet::new();
    for source in sources("src") {
        for (name, lines) in functions(&source).into_iter().filter(|(_, lines)| *lines > FUNCTION_LINES_MAX) {
            if !LONG_FUNCTIONS.iter().any(|(path, function, _)| (*path, *function) == (source.path.as_str(), name)) {
                long.insert(format!("{}: {name} has {lines} lines", source.path));
            }
        }
    }
    hold(&format!("functions have at most {FUNCTION_LINES_MAX} lines"), long);
}

#[test]
fn only_edge_files_know_the_runtime() {
    let is_edge = |source: &Source| {
        EDGE_ROOTS.contains(&source.path.as_str())
            || source.module() == "platform"
            || (source.path.matches('/').count() > 1 && EDGE_NAMES.contains(&source.name()))
    };
    let mut breaches = Vec::new();
    for source in sources("src").iter().filter(|source| !is_edge(source)) {
        for name in RUNTIME {
            let named = source
                .after(name)
                .filter(|(_, rest)| rest.starts_with("::") || rest.starts_with(" as ") || rest.starts_with(';'));
            breaches.extend(named.map(|(place, _)| format!("{place} names {name}")));
        }
    }
    hold("pure files take time, ids and rows as arguments; the runtime is for edge files (EDGE_NAMES)", breaches);
}

#[test]
fn nothing_panics_on_purpose_and_no_forbidden_call_is_made() {
    let forbidden = [
        ("unwrap", "()", "return the error"),
        ("expect", "(", "return the error"),
        ("panic", "!", "return an error"),
        ("todo", "!", "leave it out: its route is 404"),
        ("unimplemented", "!", "leave it out: its route is 404"),
        ("unreachable", "!", "make the types say so"),
        ("one", "(", "SqlCursor::one throws through Rust; use platform::sql"),
        ("one", "::<", "SqlCursor::one throws through Rust; use platform::sql"),
    ];
    let mut breaches = Vec::new();
    for source in sources("src") {
        for (word, then, instead) in forbidden {
            let is_method = matches!(word, "unwrap" | "expect" | "one");
            for at in source.words(word).filter(|at| source.code[at + word.len()..].starts_with(then)) {
                if !is_method || source.code[..at].ends_with('.') {
                    breaches.push(format!("{}:{}: {word}{then} ({instead})", source.path, source.line(at)));
                }
            }
        }
        let globs = source.after("use worker").filter(|(_, rest)| rest.split(';').next().is_some_and(|path| path.contains('*')));
        breaches.extend(globs.map(|(place, _)| format!("{place}: use worker::* (name what is used)")));
    }
    hold("outside #[cfg(test)]:", breaches);
}

#[test]
fn dependencies_point_one_way() {
    let all = sources("src");
    let modules: BTreeSet<String> = all.iter().map(|source| source.module().to_owned()).collect();
    let allowed = |module: &str| MAY_USE.iter().find(|(name, _)| *name == module).map(|(_, used)| *used);
    let mut breaches = Vec::new();
    for source in all.iter().filter(|source| !TOP.contains(&source.module())) {
        let module = source.module();
        let Some(allowed) = allowed(module) else {
            breaches.push(format!("{}: give `{module}` a row in MAY_USE and in ARCHITECTURE.md", source.path));
            continue;
        };
        let wrong = uses(source, &modules).into_iter().filter(|(_, used)| used != module && !allowed.contains(&used.as_str()));
        breaches.extend(wrong.map(|(place, used)| format!("{place}: {module} must not use {used}")));
    }
    let turned = NEVER.iter().filter(|(module, used)| allowed(module).is_some_and(|allowed| allowed.contains(used)));
    breaches.extend(turned.map(|(module, used)| format!("MAY_USE: {module} must never use {used}")));
    let documented = rows(&read("ARCHITECTURE.md"));
    for (module, used) in MAY_USE {
        let list: Vec<String> = used.iter().map(|name| format!("`{name}`")).collect();
        let row = [format!("`{module}`"), if list.is_empty() { "nothing".to_owned() } else { list.join(", ") }];
        if !documented.iter().any(|cells| *cells == row) {
            breaches.push(format!("ARCHITECTURE.md lacks the row | {} |", row.join(" | ")));
        }
    }
    hold("dependencies point one way (ARCHITECTURE.md, Dependencies):", breaches);
}

#[test]
fn objects_bindings_and_wrangler_agree() {
    let all = sources("src");
    let lib = source("src/lib.rs");
    let objects: BTreeSet<String> = all
        .iter()
        .flat_map(|source| source.code.split("#[durable_object]").skip(1))
        .map(|rest| head(rest.trim_start().trim_start_matches("pub struct ")).to_owned())
        .collect();
    let exports = lib.code.split("pub use ").skip(1).map(|rest| rest.split(';').next().unwrap());
    let exported: BTreeSet<String> = exports.map(|path| path.rsplit("::").next().unwrap().trim().to_owned()).collect();
    let config: toml::Table = toml::from_str(&read("wrangler.toml")).unwrap();
    let word = |table: &toml::Value, key: &str| table[key].as_str().unwrap().to_owned();
    let bindings = config["durable_objects"]["bindings"].as_array().unwrap();
    let bound: BTreeSet<String> = bindings.iter().map(|binding| word(binding, "class_name")).collect();
    let migrations = config["migrations"].as_array().unwrap().iter();
    let classes = migrations.filter_map(|step| step.get("new_sqlite_classes")).flat_map(|list| list.as_array().unwrap());
    let made: BTreeSet<String> = classes.map(|class| class.as_str().unwrap().to_owned()).collect();
    assert!(!objects.is_empty());
    assert_eq!(objects, exported, "src/lib.rs re-exports every #[durable_object] class, and nothing else");
    assert_eq!(objects, bound, "wrangler.toml binds every object class, and no other");
    assert_eq!(objects, made, "wrangler.toml's [[migrations]] make every object class, and no other");
    let literals: BTreeSet<&String> = all.iter().flat_map(|source| &source.literals).collect();
    let names = bindings.iter().map(|binding| word(binding, "name"));
    hold("bindings that no file uses:", names.filter(|name| !literals.contains(name)));
}

#[test]
fn every_route_is_tested_end_to_end() {
    let tests = sources("tests/e2e");
    let tested = |method: &str, path: &str| {
        let wanted: Vec<&str> = path.split('/').collect();
        let (call, constant) = (format!(".{}(", method.to_lowercase()), format!("Method::{method}"));
        tests.iter().filter(|test| test.code.contains(&call) || test.code.contains(&constant)).any(|test| {
            test.literals.iter().any(|literal| {
                let named: Vec<&str> = literal.split('?').next().unwrap().split('/').collect();
                let same = |(wanted, named): (&&str, &&str)| match named.split_once('{') {
                    // `stream{query}` is `stream`; a bare placeholder can only stand for a parameter.
                    Some((fixed, _)) if !fixed.is_empty() => *wanted == fixed,
                    Some(_) => wanted.starts_with(':'),
                    None => wanted == named || (wanted.starts_with(':') && !named.is_empty()),
                };
                wanted.len() == named.len() && wanted.iter().zip(&named).all(same)
            })
        })
    };
    let missing = ROUTES.iter().filter(|route| !tested(route.method.as_ref(), route.path));
    let missing = missing.map(|route| format!("{} {}", route.method.as_ref(), route.path));
    hold("no file of tests/e2e calls this route with its whole path in one literal:", missing);
}

#[test]
fn the_readmes_list_every_route_setting_and_code_and_no_other() {
    let routes: BTreeSet<String> = ROUTES.iter().map(|route| format!("{} {}", route.method.as_ref(), route.path)).collect();
    let config = source("src/config.rs");
    let settings: BTreeSet<&str> = config.literals.iter().map(String::as_str).filter(|literal| is_setting(literal)).collect();
    let errors = source("src/error.rs");
    let made = errors.code.split("Self::new(").skip(1).filter_map(|rest| {
        let mut numbers = rest.split(',').map(str::trim).map(str::parse::<u32>);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    let codes: BTreeSet<(u32, u32)> = made.collect();
    assert!(settings.len() > 5 && codes.len() > 10, "config.rs and error.rs are read: {settings:?} {codes:?}");
    for readme in READMES {
        let text = read(readme);
        let table = rows(&text);
        let told = table.iter().filter_map(|cells| Some((cells[0].as_str(), unquoted(cells.get(1)?)?)));
        let told: BTreeSet<String> =
            told.filter(|(_, path)| path.starts_with('/')).map(|(method, path)| format!("{method} {path}")).collect();
        assert_eq!(told, routes, "{readme}, API (left) and src/router.rs (right)");
        let told: BTreeSet<&str> = table.iter().filter_map(|cells| unquoted(&cells[0])).filter(|name| is_setting(name)).collect();
        assert_eq!(told, settings, "{readme}, configuration (left) and src/config.rs (right)");
        let told = table.iter().filter_map(|cells| Some((cells[0].parse().ok()?, cells.get(1)?.parse().ok()?)));
        let told: Vec<(u32, u32)> = told.collect();
        assert!(!told.is_empty());
        hold(
            &format!("{readme} tells of codes that src/error.rs does not make:"),
            told.iter().filter(|code| !codes.contains(code)).map(|code| format!("{code:?}")),
        );
    }
    let wrangler: toml::Table = toml::from_str(&read("wrangler.toml")).unwrap();
    let set = wrangler["vars"].as_table().unwrap().keys();
    hold("wrangler.toml sets what src/config.rs does not read:", set.filter(|name| !settings.contains(name.as_str())));
}

#[test]
fn the_readmes_show_a_stream_as_it_is() {
    let ids = Ids { session_id: Some("s".to_owned()), message_id: "m".to_owned(), request_id: "r".to_owned() };
    let usage = Usage { input: 5, output: 2, ..Usage::default() };
    let events = [
        Event::Meta { model: "gpt-4".to_owned() },
        Event::Delta("他说：\"走\"\n".to_owned(), 1),
        Event::Delta("吧".to_owned(), 2),
        Event::Quota(Box::new(Crossing {
            quota_type: QuotaType::Daily,
            total_quota: 10,
            remaining_quota: 1,
            level: Level::Critical,
        })),
        Event::Done { finish: "stop".to_owned(), model: "gpt-4".to_owned(), usage: Box::new(usage) },
    ];
    let (mut renderer, mut bytes) = (Renderer::new(Mode::Delta, ids), Vec::new());
    for (seq, event) in (1..).zip(&events) {
        renderer.render(seq, event, &mut bytes);
    }
    let stream = String::from_utf8(bytes).unwrap();
    hold(
        &format!("show this stream:\n{stream}"),
        READMES.iter().filter(|readme| !read(readme).contains(&format!("```\n{stream}```"))),
    );
}

#[test]
fn the_readmes_have_the_same_sections() {
    let levels = |readme: &str| -> Vec<usize> {
        let text = read(readme);
        let prose: String = text.split("```").step_by(2).collect();
        prose.lines().filter(|line| line.starts_with('#')).map(head_level).collect()
    };
    let [english, chinese] = READMES.map(levels);
    assert!(english.iter().filter(|level| **level == 2).count() > 5);
    assert_eq!(english, chinese, "levels of the headings of {READMES:?}, in order");
}

fn head_level(line: &str) -> usize {
    line.len() - line.trim_start_matches('#').len()
}

#[test]
fn documents_name_what_exists() {
    let all = sources("src");
    let roots = ["src/", "tests/", "tools/", "migrations/"];
    let mut breaches = Vec::new();
    for document in ["README.md", "README.zh-CN.md", "ARCHITECTURE.md"] {
        let text = read(document);
        for word in quoted(&text) {
            let path = word.split_whitespace().next().unwrap_or_default();
            if roots.iter().any(|root| path.starts_with(root)) && !exists(path) {
                breaches.push(format!("{document}: {path} is no file"));
            }
            // Type::function, module::function: the last name must occur in the code.
            let symbol =
                word.rsplit_once("::").map(|(_, last)| last).filter(|last| !last.is_empty() && last.chars().all(is_word));
            if let Some(symbol) = symbol
                && !all.iter().any(|source| source.words(symbol).next().is_some())
            {
                breaches.push(format!("{document}: nothing in src is named {symbol} ({word})"));
            }
        }
    }
    hold("documents name what exists:", breaches);
}

#[test]
fn migrations_are_numbered_without_gaps() {
    let files = names("migrations");
    let numbered =
        files.iter().enumerate().filter(|(at, name)| !(name.starts_with(&format!("{:04}_", at + 1)) && name.ends_with(".sql")));
    assert!(!files.is_empty());
    hold("migrations are 0001_name.sql, 0002_name.sql, …", numbered.map(|(at, name)| format!("{name} stands at {:04}", at + 1)));
}
