-- Removes posted sums, if they are unchanged. KEYS: the numbered sums. ARGV: for each its function, and its
-- text as returned when it was numbered.
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return 1
