//! `GET /ai/health` (public), `/ai/models`, `/ai/providers` (contract 2.8).

use serde_json::{Value, json};
use worker::Response;

use crate::config::{Model, PROVIDER};
use crate::error::ApiError;
use crate::platform::request::Ctx;
use crate::platform::{clock, respond};

/// `GET /ai/health`: the Worker runs and its configuration is usable (a bad one answers 500 before this).
///
/// # Errors
/// When the body cannot be serialised.
pub async fn health(ctx: Ctx) -> Result<Response, ApiError> {
    let data = json!({"status": "healthy", "timestamp": clock::now_ms() / 1000, "service": "ai"});
    respond::ok(&ctx.request_id, "操作成功", &data)
}

/// `GET /ai/models?provider=`: the catalogue.
///
/// # Errors
/// When the body cannot be serialised.
pub async fn models(ctx: Ctx) -> Result<Response, ApiError> {
    let wanted = ctx.param("provider").is_none_or(|provider| provider == PROVIDER);
    let rows: Vec<Value> = ctx.config.models.iter().filter(|_| wanted).map(model).collect();
    respond::ok(&ctx.request_id, "获取成功", &Value::Array(rows))
}

fn model(model: &Model) -> Value {
    let credits = |micro: u64| micro as f64 / 1e6;
    json!({
        "id": model.id, "name": model.id, "provider": PROVIDER,
        "maxTokens": model.max_output, "contextWindow": model.context_window,
        "costPer1k": credits(model.price.output_micro),
        "inputPrice": credits(model.price.input_micro), "outputPrice": credits(model.price.output_micro),
    })
}

/// `GET /ai/providers`: the provider and the models it serves.
///
/// # Errors
/// When the body cannot be serialised.
pub async fn providers(ctx: Ctx) -> Result<Response, ApiError> {
    let models: Vec<&str> = ctx.config.models.iter().map(|model| model.id.as_str()).collect();
    let data = json!([{"name": PROVIDER, "displayName": "OpenAI 兼容服务", "status": "active", "models": models}]);
    respond::ok(&ctx.request_id, "获取成功", &data)
}
