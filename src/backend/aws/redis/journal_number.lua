-- Numbers the sums of some functions, under which they are posted. Sums that have a number keep it, and themselves, until they
-- are posted: whoever posts them in the end, their function adds them once.
--
-- Numbers grow, also where Redis has lost or forgotten the last one: they are above the floor, which is the largest that the
-- caller has seen, and not below the time in microseconds. (The last one is forgotten after a day, by when a clock that was set
-- back has caught up.)
--
-- Nothing is done while the mark is gone. Redis has lost its data then, and an answer that there is nothing to be posted would
-- have the caller forget what it alone still knows.
--
-- KEYS: the sums that are not posted, those that have a number, the last number, the mark that the journal is whole. ARGV: the
-- floor, and functions. Answer: for each function "number:" and its sums, or an empty text, and the sums that have no number
-- yet, or an empty text; nil if the mark is gone.
if redis.call('EXISTS', KEYS[4]) == 0 then return false end
local time = redis.call('TIME')
local last = math.max(tonumber(redis.call('GET', KEYS[3]) or '0'), time[1] * 1000000 + time[2], tonumber(ARGV[1]))
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
