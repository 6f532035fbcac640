//! One conversation with a real model, so that nothing between the author and llama.cpp rests on our own idea of a
//! provider. The model is tiny: structure is asserted, never wording.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::support::api::{text, usage_of};
use crate::support::keeper::Keeper;
use crate::support::sse::{raw_of, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{run, wait_until};

/// The first start fetches the model and its server.
const START_LIMIT: Duration = Duration::from_secs(200);

/// The local model, for as long as this lives.
struct LocalModel {
    base_url: String,
    keeper: Option<Keeper>,
}

impl LocalModel {
    async fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("inkstone-e2e-model-").tempdir().expect("a temporary folder").keep();
        let log: PathBuf = folder.join("log");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut program = Command::new(root.join("tools/local_model"));
        program.arg("0").current_dir(root);
        let mut model = Self { base_url: String::new(), keeper: Some(Keeper::start(&program, &log, &folder)) };
        let printed = wait_until(START_LIMIT, "the local model's base URL", || async {
            let printed = std::fs::read_to_string(&log).unwrap_or_default();
            printed.lines().find(|line| line.starts_with("http://")).map(str::to_owned)
        });
        model.base_url = printed.await;
        model
    }
}

impl Drop for LocalModel {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            keeper.end(false);
        }
    }
}

#[test]
fn a_real_model_answers_through_the_whole_path() {
    run(async {
        let model = LocalModel::start().await;
        let catalogue = r#"[{"id":"smollm2-135m","contextWindow":8192,"maxOutput":1024,"inputPrice":0.1,"outputPrice":0.2}]"#;
        let changes = [("LLM_BASE_URL", model.base_url.as_str()), ("LLM_MODELS", catalogue), ("DEFAULT_MODEL", "smollm2-135m")];
        let worker = Worker::start(&changes).await;
        let user = worker.user("writer");
        let body = json!({"message": "Write one sentence about an inkstone.", "options": {"maxTokens": 48, "temperature": 0.2}});
        let events = user.stream(body).await.rest().await;
        assert_eq!(events[0].name, "meta");
        let done = terminal(&events, "done").json();
        assert!(["stop", "length"].contains(&text(&done, "finishReason")), "{done}");
        let [prompt, completion, total] = usage_of(&done);
        assert!(prompt > 5 && (1..=48).contains(&completion), "{done}");
        assert!(!text_of(&events).trim().is_empty());
        assert_eq!(user.charged().await, total, "what llama.cpp counted is what is charged");

        let session = text(&done, "sessionId");
        let again = user.resuming(session, None, None).stream().await.rest().await;
        assert_eq!(raw_of(&again), raw_of(&events));
        let next = json!({"message": "Shorter.", "sessionId": session, "options": {"maxTokens": 16}});
        let answer = user.ask(next).await;
        assert!(usage_of(&answer)[0] > prompt, "the history is in the prompt: {answer}");
        assert_eq!(user.messages(session).await.len(), 4);
    });
}
