-- Forgets sums that are posted, if they are still those.
-- KEYS: the sums that have a number. ARGV: for each its function, and the text that it was drawn as.
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return 1
