//! The operator's configuration (names in design.md), read and checked once per isolate.
//!
//! Invariant: a value that cannot be used is told by its name in the log and stops every request with 500, instead of
//! being replaced by a guess. Bindings do not change within an isolate, so one parse serves its life.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use serde::Deserialize;
use serde_json::value::RawValue;
use worker::Env;

use crate::error::ApiError;
use crate::identity::token::Verifier;
use crate::platform::log;
use crate::quota::period::Zone;
use crate::quota::price::{Price, parse_micro};

/// The one provider there is: whatever OpenAI-compatible service `LLM_BASE_URL` names.
pub const PROVIDER: &str = "openai-compatible";

/// Everything configurable, parsed.
pub struct Config {
    /// Checks bearer tokens.
    pub verifier: Verifier,
    /// Base URL of the provider, without a trailing slash; ends in `/v1`.
    pub llm_base_url: String,
    /// The provider's key; never logged, never answered.
    pub llm_api_key: Option<String>,
    /// The catalogue, at least one model.
    pub models: Vec<Model>,
    /// Id of the model used where none is named.
    pub default_model: String,
    /// The platform's midnight.
    pub zone: Zone,
    /// Exact origins that may call from a browser.
    pub allowed_origins: Vec<String>,
    /// The provider may be silent this long, ms.
    pub stream_idle_ms: i64,
    /// A waiting client hears a comment this often, ms.
    pub heartbeat_ms: i64,
    /// A hold nobody renews is freed after this, ms.
    pub hold_ttl_ms: i64,
    /// Keys of services that sign their requests: id → secret.
    pub service_keys: BTreeMap<String, String>,
    /// Where the platform wants to hear of thresholds.
    pub notify_webhook_url: Option<String>,
}

/// One model of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// What callers name it.
    pub id: String,
    /// What the provider names it.
    pub upstream: String,
    /// Prompt and output together, tokens.
    pub context_window: u64,
    /// Most output of one call, tokens.
    pub max_output: u64,
    /// Credits per 1,000 tokens.
    pub price: Price,
}

impl Config {
    /// The configuration of this isolate.
    ///
    /// # Errors
    /// 500/5000 when a value cannot be used; which one is in the log.
    pub fn of(env: &Env) -> Result<Rc<Self>, ApiError> {
        thread_local! {
            static PARSED: RefCell<Option<Rc<Config>>> = const { RefCell::new(None) };
        }
        if let Some(config) = PARSED.with(|parsed| parsed.borrow().clone()) {
            return Ok(config);
        }
        let lookup = |name: &str| env.var(name).ok().map(|value| value.to_string()).filter(|value| !value.trim().is_empty());
        let config = Self::parse(lookup).map_err(|cause| {
            log::error("config", "", &cause);
            ApiError::internal()
        })?;
        let config = Rc::new(config);
        PARSED.with(|parsed| *parsed.borrow_mut() = Some(config.clone()));
        Ok(config)
    }

    /// Parses what `lookup` finds under each name; an absent and an empty value are the same.
    ///
    /// # Errors
    /// An English sentence naming the variable and what is wrong with it.
    pub fn parse(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let or = |name: &str, default: &str| lookup(name).unwrap_or_else(|| default.to_owned());
        let millis = |name: &str, default: i64, unit_ms: i64| match lookup(name) {
            None => Ok(default * unit_ms),
            Some(text) => match text.trim().parse::<i64>() {
                Ok(value) if (1..=86_400_000 / unit_ms).contains(&value) => Ok(value * unit_ms),
                _ => Err(format!("{name} must be a whole number above 0, got {text:?}")),
            },
        };
        let models = parse_models(&lookup("LLM_MODELS").ok_or("LLM_MODELS is missing")?)?;
        let first = models.first().map(|model| model.id.clone()).ok_or("LLM_MODELS names no model")?;
        let default_model = or("DEFAULT_MODEL", &first);
        if !models.iter().any(|model| model.id == default_model) {
            return Err(format!("DEFAULT_MODEL {default_model:?} is not in LLM_MODELS"));
        }
        let base = lookup("LLM_BASE_URL").ok_or("LLM_BASE_URL is missing")?;
        if !base.starts_with("http://") && !base.starts_with("https://") {
            return Err("LLM_BASE_URL must be an http(s) URL".to_owned());
        }
        let (secret, jwks) = (lookup("JWT_SECRET"), lookup("JWT_JWKS"));
        let (issuer, audience) = (lookup("JWT_ISSUER"), lookup("JWT_AUDIENCE"));
        Ok(Self {
            verifier: Verifier::new(secret.as_deref(), jwks.as_deref(), issuer.as_deref(), audience.as_deref())?,
            llm_base_url: base.trim_end_matches('/').to_owned(),
            llm_api_key: lookup("LLM_API_KEY"),
            models,
            default_model,
            zone: Zone::parse(or("QUOTA_UTC_OFFSET", "+08:00").trim())?,
            allowed_origins: or("ALLOWED_ORIGINS", "")
                .split(',')
                .map(|o| o.trim().to_owned())
                .filter(|o| !o.is_empty())
                .collect(),
            stream_idle_ms: millis("STREAM_IDLE_MS", 30_000, 1)?,
            heartbeat_ms: millis("HEARTBEAT_MS", 15_000, 1)?,
            hold_ttl_ms: millis("HOLD_TTL_S", 600, 1_000)?,
            service_keys: parse_service_keys(lookup("SERVICE_KEYS").as_deref())?,
            notify_webhook_url: lookup("NOTIFY_WEBHOOK_URL"),
        })
    }

    /// The model `id` names.
    ///
    /// # Errors
    /// 404/3530 when the catalogue has none of that id.
    pub fn model(&self, id: &str) -> Result<&Model, ApiError> {
        self.models.iter().find(|model| model.id == id).ok_or_else(|| ApiError::model_unknown(id))
    }
}

fn parse_service_keys(text: Option<&str>) -> Result<BTreeMap<String, String>, String> {
    let Some(text) = text else { return Ok(BTreeMap::new()) };
    // The error must not quote the value: it is a secret.
    let keys: BTreeMap<String, String> =
        serde_json::from_str(text).map_err(|_| "SERVICE_KEYS must be a JSON object of key ids and secrets".to_owned())?;
    if keys.iter().any(|(id, secret)| id.is_empty() || secret.is_empty()) {
        return Err("SERVICE_KEYS: ids and secrets must not be empty".to_owned());
    }
    Ok(keys)
}

fn parse_models(text: &str) -> Result<Vec<Model>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Row<'a> {
        id: String,
        upstream: Option<String>,
        context_window: u64,
        max_output: u64,
        // Prices are read as they are written: through a float they would not be exact.
        #[serde(borrow)]
        input_price: &'a RawValue,
        #[serde(borrow)]
        output_price: &'a RawValue,
    }
    let rows: Vec<Row<'_>> = serde_json::from_str(text).map_err(|e| format!("LLM_MODELS: {e}"))?;
    let mut models: Vec<Model> = Vec::with_capacity(rows.len());
    for row in rows {
        let told = |why: String| format!("LLM_MODELS, model {:?}: {why}", row.id);
        if row.id.is_empty() || models.iter().any(|model| model.id == row.id) {
            return Err(told("ids must be unique and not empty".to_owned()));
        }
        if row.max_output == 0 || row.max_output >= row.context_window {
            return Err(told("maxOutput must be above 0 and below contextWindow".to_owned()));
        }
        let price = |raw: &RawValue| parse_micro(raw.get().trim_matches('"'));
        let price =
            Price { input_micro: price(row.input_price).map_err(told)?, output_micro: price(row.output_price).map_err(told)? };
        models.push(Model {
            upstream: row.upstream.unwrap_or_else(|| row.id.clone()),
            id: row.id,
            context_window: row.context_window,
            max_output: row.max_output,
            price,
        });
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(changes: &[(&str, &str)]) -> Result<Config, String> {
        let base = [
            ("JWT_SECRET", "0123456789abcdef0123456789abcdef"),
            ("LLM_BASE_URL", "http://127.0.0.1:1/v1/"),
            ("LLM_MODELS", r#"[{"id":"m","contextWindow":8192,"maxOutput":1024,"inputPrice":0.1,"outputPrice":"0.2"}]"#),
        ];
        Config::parse(|name| {
            let of = |pairs: &[(&str, &str)]| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            of(changes).or_else(|| of(&base)).filter(|value| !value.is_empty())
        })
    }

    #[test]
    fn a_good_configuration_is_read_exactly() {
        let config = with(&[("ALLOWED_ORIGINS", "https://a.cn, https://b.cn"), ("HOLD_TTL_S", "5")]).unwrap();
        assert_eq!(config.model("m").unwrap().price, Price { input_micro: 100_000, output_micro: 200_000 });
        assert_eq!((config.default_model.as_str(), config.hold_ttl_ms), ("m", 5_000));
        assert_eq!(config.llm_base_url, "http://127.0.0.1:1/v1");
        assert_eq!(config.allowed_origins, ["https://a.cn", "https://b.cn"]);
        assert_eq!(config.model("x").unwrap_err().code, 3530);
    }

    #[test]
    fn a_bad_value_is_named() {
        for (name, value) in [
            ("JWT_SECRET", "short"),
            ("LLM_BASE_URL", "ftp://x"),
            ("LLM_MODELS", "[]"),
            ("LLM_MODELS", r#"[{"id":"m","contextWindow":10,"maxOutput":10,"inputPrice":1,"outputPrice":1}]"#),
            ("LLM_MODELS", r#"[{"id":"m","contextWindow":100,"maxOutput":10,"inputPrice":-1,"outputPrice":1}]"#),
            ("DEFAULT_MODEL", "other"),
            ("QUOTA_UTC_OFFSET", "Shanghai"),
            ("HOLD_TTL_S", "0"),
            ("STREAM_IDLE_MS", "1e3"),
        ] {
            let cause = with(&[(name, value)]).err().unwrap_or_default();
            let named = if name == "LLM_MODELS" { "LLM_MODELS" } else { name };
            assert!(cause.contains(named) || cause.contains("price"), "{name}={value}: {cause}");
        }
    }
}
