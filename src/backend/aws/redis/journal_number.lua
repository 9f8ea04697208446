-- Assigns numbers to the sums of some functions, under which they are posted. Numbered sums do not change
-- until they are posted, so their function adds them once, no matter which node posts them or how often.
--
-- Numbers grow, even if Redis has lost or expired the last one. They are above the floor, which is the
-- largest number that the caller has seen, and not below the time in microseconds. The last number expires
-- after a day. By then a clock that was set back has caught up.
--
-- Nothing is done while the marker is gone. Redis has lost its data then, and the answer "nothing to post"
-- would make the caller discard the only copy of the sums.
--
-- KEYS: the unposted sums, the numbered sums, the last number, the completeness marker of the journal. ARGV:
-- the floor, and functions. Answer: for each function "number:sums" or an empty string, and the sums that
-- have no number yet or an empty string; nil if the marker is gone.
if redis.call('EXISTS', KEYS[4]) == 0 then return false end
local time = redis.call('TIME')
local last = math.max(
  tonumber(redis.call('GET', KEYS[3]) or '0'), time[1] * 1000000 + time[2], tonumber(ARGV[1]))
local answer, drawn = {}, false
for i = 2, #ARGV do
  local name = ARGV[i]
  local numbered = redis.call('HGET', KEYS[2], name)
  local sums = redis.call('HGET', KEYS[1], name)
  if sums and not numbered then
    last, drawn = last + 1, true
    numbered = string.format('%.0f:', last) .. sums
    redis.call('HSET', KEYS[2], name, numbered)
    redis.call('HDEL', KEYS[1], name)
    sums = false
  end
  answer[#answer + 1] = numbered or ''
  answer[#answer + 1] = sums or ''
end
if drawn then redis.call('SET', KEYS[3], string.format('%.0f', last), 'EX', 86400) end
return answer
