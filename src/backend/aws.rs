//! The fleet backend: SQS, DynamoDB, S3 and Redis.
