-- Numbers the sums of some functions, under which they are posted. Sums that have a number keep it, and themselves, until they
-- are posted: whoever posts them in the end, their function adds them once.
--
-- Numbers grow, also where Redis has lost or forgotten the last one: they are not below the time in microseconds. (It is forgotten
-- after a day, by when a clock that was set back has caught up.)
--
-- KEYS: the sums that are not posted, those that have a number, the last number. ARGV: functions. Answer: for each function
-- "number:" and its sums, or an empty text, and 1 if there is more for it that has no number yet.
local time = redis.call('TIME')
local last = math.max(tonumber(redis.call('GET', KEYS[3]) or '0'), time[1] * 1000000 + time[2])
local answer, drawn = {}, false
for _, name in ipairs(ARGV) do
  local numbered, more = redis.call('HGET', KEYS[2], name), 0
  local sums = redis.call('HGET', KEYS[1], name)
  if numbered then
    if sums then more = 1 end
  elseif sums then
    last, drawn = last + 1, true
    numbered = string.format('%.0f:', last) .. sums
    redis.call('HSET', KEYS[2], name, numbered)
    redis.call('HDEL', KEYS[1], name)
  end
  answer[#answer + 1] = numbered or ''
  answer[#answer + 1] = more
end
if drawn then redis.call('SET', KEYS[3], string.format('%.0f', last), 'EX', 86400) end
return answer
