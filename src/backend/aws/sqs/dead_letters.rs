//! Reads the dead-letter queue that the RedrivePolicy of the task queue names.

use crate::backend::aws::error::class;
use crate::backend::aws::redis::connection::CommandConnection;
use crate::backend::aws::redis::results::{STORED_S, channel, stored_key};
use crate::backend::{BackendError, DeadLetter, DeadLetters};
use crate::model::{FunctionId, JobId};
use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName};
use bytes::Bytes;
use redis::cmd;
use serde::Deserialize;
use std::sync::Arc;

/// Visibility timeout of a message that was read, in seconds. It is short, so that a redrive finds the
/// message.
const HIDDEN_S: i32 = 30;
/// Maximum number of messages per call; the limit of SQS.
const MESSAGES_MAX: i32 = 10;

pub struct DeadLetterQueue {
    client: Client,
    url: String,
    commands: Arc<CommandConnection>,
}

/// The members of the queue attribute that are used here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RedrivePolicy {
    dead_letter_target_arn: String,
}

impl DeadLetterQueue {
    /// Finds the queue that a RedrivePolicy names.
    pub async fn find(
        client: Client,
        commands: Arc<CommandConnection>,
        policy: &str,
    ) -> Result<Self, BackendError> {
        let unclear =
            || BackendError::Invalid("the RedrivePolicy of the queue names no dead-letter queue".into());
        let policy: RedrivePolicy = serde_json::from_str(policy).map_err(|_| unclear())?;
        // arn:aws:sqs:<region>:<account>:<name>
        let mut parts = policy.dead_letter_target_arn.rsplit(':');
        let (Some(name), Some(account)) = (parts.next(), parts.next()) else { return Err(unclear()) };
        let found = client.get_queue_url().queue_name(name).queue_owner_aws_account_id(account).send().await;
        let url = found.map_err(|e| class(&e))?.queue_url.ok_or_else(unclear)?;
        Ok(Self { client, url, commands })
    }
}

#[async_trait]
impl DeadLetters for DeadLetterQueue {
    async fn read(&self) -> Result<Vec<DeadLetter>, BackendError> {
        let call = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(MESSAGES_MAX)
            .visibility_timeout(HIDDEN_S)
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        let messages = call.send().await.map_err(|e| class(&e))?.messages.unwrap_or_default();
        Ok(messages.into_iter().map(dead_letter).collect())
    }

    async fn answer(&self, id: JobId, result: Bytes) -> Result<bool, BackendError> {
        let text = result.as_ref();
        let mut store = cmd("SET");
        store.arg(stored_key(&id.to_string())).arg(text).arg("NX").arg("EX").arg(STORED_S);
        let stored: Option<String> = self.commands.query(&store).await?;
        if stored.is_some() {
            self.commands.query::<()>(cmd("PUBLISH").arg(channel(id)).arg(text)).await?;
        }
        Ok(stored.is_some())
    }

    async fn delete(&self, letters: &[DeadLetter]) -> Result<(), BackendError> {
        let mut entries = Vec::with_capacity(letters.len());
        for (n, letter) in letters.iter().enumerate() {
            let entry = DeleteMessageBatchRequestEntry::builder();
            let entry = entry.id(n.to_string()).receipt_handle(&letter.receipt).build();
            entries.push(entry.map_err(|e| BackendError::Invalid(e.to_string()))?);
        }
        let call = self.client.delete_message_batch().queue_url(&self.url).set_entries(Some(entries));
        let failed = call.send().await.map_err(|e| class(&e))?.failed;
        match failed.first() {
            None => Ok(()),
            Some(entry) => {
                Err(BackendError::Unavailable(format!("a message was not deleted: {}", entry.code)))
            }
        }
    }
}

fn dead_letter(message: Message) -> DeadLetter {
    /// The members of a job message that identify the job.
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Named {
        request_id: String,
        function_id: String,
    }
    let named: Option<Named> = message.body.as_deref().and_then(|body| serde_json::from_str(body).ok());
    let job = named.and_then(|n| Some((JobId::parse(&n.request_id)?, FunctionId::parse(&n.function_id)?)));
    DeadLetter { job, receipt: message.receipt_handle.unwrap_or_default() }
}
