//! SQL of a Durable Object, typed, and its one transaction.
//!
//! Invariant: `SqlCursor::one` is never used (it throws through Rust on any count but one), and writes that belong
//! together go through [`Sql::transaction`], because a handler's error does not undo what it wrote before.

use js_sys::{Function, Reflect};
use serde::de::DeserializeOwned;
use wasm_bindgen::JsValue;
use wasm_bindgen::closure::Closure;
use worker::{SqlStorage, SqlStorageValue, State, Storage};

/// A failed statement. The cause is for the log only.
#[derive(Debug, thiserror::Error)]
#[error("sql: {0}")]
pub struct SqlError(String);

impl From<worker::Error> for SqlError {
    fn from(error: worker::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<serde_json::Error> for SqlError {
    fn from(error: serde_json::Error) -> Self {
        Self(error.to_string())
    }
}

/// The SQLite database of one object.
#[derive(Clone)]
pub struct Sql {
    sql: SqlStorage,
    storage: std::rc::Rc<Storage>,
}

/// An integer parameter. Everything stored is within ±2^53 (`quota::SAFE_INTEGER_MAX`); beyond, it saturates.
#[must_use]
pub fn int(value: u64) -> SqlStorageValue {
    SqlStorageValue::Integer(i64::try_from(value.min(crate::quota::SAFE_INTEGER_MAX)).unwrap_or(i64::MAX))
}

impl Sql {
    /// The database of `state`'s object.
    #[must_use]
    pub fn of(state: &State) -> Self {
        let storage = state.storage();
        Self { sql: storage.sql(), storage: std::rc::Rc::new(storage) }
    }

    /// Runs a statement; answers how many rows it wrote (indexes count too: zero means nothing was written).
    ///
    /// # Errors
    /// When SQLite refuses it.
    pub fn run(&self, query: &str, values: Vec<SqlStorageValue>) -> Result<usize, SqlError> {
        Ok(self.sql.exec(query, values)?.rows_written())
    }

    /// All rows of a query.
    ///
    /// # Errors
    /// When SQLite refuses it or a row has another shape.
    pub fn rows<T: DeserializeOwned>(&self, query: &str, values: Vec<SqlStorageValue>) -> Result<Vec<T>, SqlError> {
        Ok(self.sql.exec(query, values)?.to_array()?)
    }

    /// The first row of a query, if any.
    ///
    /// # Errors
    /// As [`Self::rows`].
    pub fn first<T: DeserializeOwned>(&self, query: &str, values: Vec<SqlStorageValue>) -> Result<Option<T>, SqlError> {
        Ok(self.rows(query, values)?.into_iter().next())
    }

    /// Runs `work` in one transaction: all of its writes or none. Synchronous, so nothing can come between.
    ///
    /// # Errors
    /// What `work` failed with; its writes are rolled back then.
    pub fn transaction(&self, work: impl FnOnce() -> Result<(), SqlError> + 'static) -> Result<(), SqlError> {
        let lost = |_| SqlError("transactionSync is missing".to_owned());
        let storage: &JsValue = self.storage.as_raw().as_ref();
        let method: Function = Reflect::get(storage, &"transactionSync".into()).map_err(lost)?.into();
        let closure = Closure::once_into_js(move || work().map_err(|error| JsValue::from_str(&error.0)));
        let thrown = |value: JsValue| SqlError(value.as_string().unwrap_or_else(|| format!("{value:?}")));
        method.call1(storage, &closure).map(|_| ()).map_err(thrown)
    }
}
