//! Classifies AWS failures by their code and HTTP status, never by their text.

use super::client::UnusablePart;
use crate::backend::BackendError;
use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use std::error::Error;

const MISSING: &[&str] = &[
    "AWS.SimpleQueueService.NonExistentQueue",
    "NoSuchBucket",
    "NoSuchKey",
    "QueueDoesNotExist",
    "ResourceNotFoundException",
];

/// Codes for a denial by a policy, not by the credentials. Only their text is shown, because it names the
/// missing action.
const NOT_ALLOWED: &[&str] = &["AccessDenied", "AccessDeniedException"];

const DENIED: &[&str] = &[
    "AuthFailure",
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "IncompleteSignatureException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidSignatureException",
    "InvalidToken",
    "KMS.AccessDeniedException",
    "KmsAccessDenied",
    "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
    "NotAuthorized",
    "OptInRequired",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
];

/// Codes for temporary rejections.
const THROTTLED: &[&str] = &[
    "KMS.ThrottlingException",
    "KmsThrottled",
    "LimitExceededException",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    // A running transaction holds the item.
    "TransactionConflictException",
    "TransactionInProgressException",
];

/// Classifies a failure. The text holds the code, never keys or bodies.
pub(super) fn class<E>(error: &SdkError<E, HttpResponse>) -> BackendError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match error {
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            by_code(answer.err().code(), status, answer.err().message())
        }
        SdkError::TimeoutError(_) => BackendError::Unavailable("no answer in time".into()),
        SdkError::ResponseError(_) => BackendError::Unavailable("the answer could not be read".into()),
        SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_) => {
            if let Some(credentials) = find_source::<CredentialsError>(error) {
                return credentials_class(credentials);
            }
            match find_source::<std::io::Error>(error) {
                Some(io) => BackendError::Unavailable(format!("no connection: {}", io.kind())),
                None if matches!(error, SdkError::ConstructionFailure(_)) => {
                    BackendError::Invalid("the request could not be built".into())
                }
                None => BackendError::Unavailable("no connection".into()),
            }
        }
        _ => BackendError::Unavailable("an unknown failure".into()),
    }
}

/// Classifies an error answer.
pub(super) fn by_code(code: Option<&str>, status: u16, message: Option<&str>) -> BackendError {
    let code = code.unwrap_or("no error code");
    let text = format!("{code} (HTTP {status})");
    if MISSING.contains(&code) {
        return BackendError::Missing(text);
    }
    if NOT_ALLOWED.contains(&code) {
        return BackendError::Denied(message.map_or(text, |m| format!("{code}: {m}")));
    }
    // Other texts are hidden: a signature mismatch quotes the request with its session token.
    if DENIED.contains(&code) {
        return BackendError::Denied(text);
    }
    if is_throttle(code) || matches!(status, 408 | 429 | 500..) {
        return BackendError::Unavailable(text);
    }
    match status {
        401 | 403 => BackendError::Denied(text),
        _ => BackendError::Invalid(text),
    }
}

/// Classifies a failure of the credential chain. The text never holds the credentials.
pub(super) fn credentials_class(error: &CredentialsError) -> BackendError {
    match error {
        CredentialsError::CredentialsNotLoaded(_) => {
            BackendError::Missing("the AWS credential chain found no credentials".into())
        }
        CredentialsError::InvalidConfiguration(_) => {
            let part = find_source::<UnusablePart>(error).map(ToString::to_string);
            let unknown = || "the configuration of the AWS credentials is not valid".to_owned();
            BackendError::Invalid(part.unwrap_or_else(unknown))
        }
        CredentialsError::ProviderTimedOut(_) => {
            BackendError::Unavailable("the provider of the AWS credentials did not answer".into())
        }
        _ => BackendError::Unavailable("the provider of the AWS credentials failed".into()),
    }
}

/// Whether the code means that the request was rejected temporarily and had no effect.
pub(super) fn is_throttle(code: &str) -> bool {
    THROTTLED.contains(&code)
}

fn find_source<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut chain = std::iter::successors(Some(error), |error| {
        let error: &'a (dyn Error + 'static) = *error;
        error.source()
    });
    chain.find_map(|error| error.downcast_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_sqs::error::ErrorMetadata;
    use aws_sdk_sqs::operation::send_message_batch::SendMessageBatchError;
    use aws_smithy_runtime_api::client::result::ConnectorError;
    use aws_smithy_types::body::SdkBody;

    type Failure = SdkError<SendMessageBatchError, HttpResponse>;

    fn answer(code: &str, status: u16) -> Failure {
        let metadata = ErrorMetadata::builder().code(code).message("the message").build();
        let raw = HttpResponse::new(status.try_into().unwrap(), SdkBody::empty());
        SdkError::service_error(SendMessageBatchError::generic(metadata), raw)
    }

    #[test]
    fn codes_are_classified() {
        use BackendError::*;
        let denied = "AccessDeniedException: the message";
        for (code, status, expected) in [
            ("QueueDoesNotExist", 400, Missing("QueueDoesNotExist (HTTP 400)".into())),
            ("AccessDeniedException", 400, Denied(denied.into())),
            ("SignatureDoesNotMatch", 403, Denied("SignatureDoesNotMatch (HTTP 403)".into())),
            ("SomethingNew", 403, Denied("SomethingNew (HTTP 403)".into())),
            ("ValidationException", 400, Invalid("ValidationException (HTTP 400)".into())),
            ("ThrottlingException", 400, Unavailable("ThrottlingException (HTTP 400)".into())),
            (
                "TransactionConflictException",
                400,
                Unavailable("TransactionConflictException (HTTP 400)".into()),
            ),
            ("Slow", 429, Unavailable("Slow (HTTP 429)".into())),
            ("InternalFailure", 500, Unavailable("InternalFailure (HTTP 500)".into())),
            ("ServiceUnavailable", 503, Unavailable("ServiceUnavailable (HTTP 503)".into())),
        ] {
            let failure = answer(code, status);
            assert_eq!(class(&failure), expected);
        }
    }

    #[test]
    fn a_missing_answer_is_not_a_rejection() {
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let chain = CredentialsError::not_loaded("none");
        for (failure, expected) in [
            (Failure::timeout_error("slow"), "no answer in time"),
            (Failure::dispatch_failure(ConnectorError::io(reset.into())), "no connection: connection reset"),
            (
                Failure::dispatch_failure(ConnectorError::other(chain.into(), None)),
                "the AWS credential chain found no credentials",
            ),
        ] {
            assert_eq!(class(&failure).to_string(), expected);
        }
    }
}
